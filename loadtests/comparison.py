"""Two runs of one trace side by side: ratios, and what they mean in plain sentences.

``python -m nestedfp.loadtests.comparison BASELINE RUN --ttft-s 1 --tpot-s 0.1`` compares two result files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestedfp.loadtests.metrics import Slo, summarize_records
from nestedfp.loadtests.records import RecordError, RequestRecord, read_requests
from nestedfp.loadtests.table import MARGIN, Metric, ratio_of, run_table

JUDGED = (
    Metric(("ttft_ms", "p90"), "TTFT p90", "ms", "lower"),
    Metric(("tpot_ms", "p90"), "TPOT p90", "ms", "lower"),
    Metric(("goodput_rps",), "goodput", "req/s", "higher"),
)


def compare(baseline: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """``ratios`` (run over baseline) of what is judged, and ``sentences`` that say what they mean.

    Both are summaries of the same trace, the baseline's served in FP16 throughout. A difference within MARGIN
    counts as none; where nothing got better, a sentence says that FP8 did not make serving faster. Runs that
    sent different numbers of requests have no ratios, only a sentence that says so.
    """
    sent = [Metric(("requests", "sent"), "sent").of(side) or 0 for side in (baseline, run)]
    if sent[0] != sent[1]:
        told = f"The runs sent {sent[0]:.0f} and {sent[1]:.0f} requests: they cannot be compared."
        return {"ratios": {}, "sentences": [told]}
    better, worse, same = [], [], []
    ratios: dict[str, float | None] = {}
    for metric in JUDGED:
        value, base = metric.of(run), metric.of(baseline)
        ratio = ratios[metric.label] = ratio_of(value, base)
        said = f"{metric.label} {metric.text(value)} against {metric.text(base)}"
        if ratio is None and value and metric.better == "higher":
            better.append(said)
        elif ratio is None:
            same.append(f"{said} (no ratio)")
        elif abs(ratio - 1) <= MARGIN:
            same.append(said)
        elif (ratio < 1) == (metric.better == "lower"):
            better.append(f"{said} (x {ratio:.2f})")
        else:
            worse.append(f"{said} (x {ratio:.2f})")
    return {"ratios": ratios, "sentences": _sentences(run, better, worse, same)}


def _sentences(run: Mapping[str, Any], better: list[str], worse: list[str], same: list[str]) -> list[str]:
    fp8 = Metric(("tokens", "fp8"), "").of(run)
    sentences = []
    if not fp8:
        sentences.append("No token was computed in FP8, so this run shows nothing about it.")
    elif not better:
        sentences.append("FP8 did not make serving faster here than static FP16.")
    if better:
        sentences.append(f"Better than static FP16: {'; '.join(better)}.")
    if worse:
        sentences.append(f"Worse than static FP16: {'; '.join(worse)}.")
    if same:
        sentences.append(f"Within {MARGIN:.0%} of static FP16: {'; '.join(same)}.")
    sentences.append("One run on each side.")
    return sentences


def same_trace(one: Sequence[RequestRecord], other: Sequence[RequestRecord]) -> bool:
    """Whether both runs replayed the same requests at the same times."""

    def asked(records: Sequence[RequestRecord]) -> list[tuple[float, int, int, str]]:
        return [(r.scheduled_s, r.trace_prompt_tokens, r.max_tokens, r.precision_class) for r in records]

    return asked(one) == asked(other)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: the table and the sentences; 1 where the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m nestedfp.loadtests.comparison", description=__doc__)
    parser.add_argument("baseline", type=Path, help="requests.jsonl of the trace served in FP16 throughout")
    parser.add_argument("run", type=Path, help="requests.jsonl of the same trace under the policy")
    parser.add_argument("--ttft-s", type=float, help="SLO: TTFT in seconds")
    parser.add_argument("--tpot-s", type=float, help="SLO: TPOT in seconds")
    options = parser.parse_args(arguments)
    try:
        slo = Slo(options.ttft_s, options.tpot_s)
        baseline, run = read_requests(options.baseline), read_requests(options.run)
        if not same_trace(baseline, run):
            raise ValueError(f"{options.baseline} and {options.run} replayed different requests")
        static, policy = summarize_records(baseline, slo), summarize_records(run, slo)
    except (OSError, RecordError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(run_table({"static FP16": static, "policy": policy}))
    print("\n".join(["", *compare(static, policy)["sentences"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
