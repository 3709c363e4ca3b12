from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.loadtests.metrics import (
    Slo,
    distribution_ms,
    mode_spans,
    summarize,
    summarize_records,
    summarize_timeline,
)
from nestedfp.loadtests.records import (
    Flip,
    RecordError,
    RequestRecord,
    Sample,
    Timeline,
    read_requests,
    read_timeline,
)


def record(index: int = 0, **values: Any) -> RequestRecord:
    base: dict[str, Any] = {
        "index": index,
        "scheduled_s": float(index),
        "sent_s": index + 0.01,
        "lag_s": 0.01,
        "ended_s": index + 2.0,
        "trace_prompt_tokens": 8,
        "max_tokens": 11,
        "ok": True,
        "status": 200,
        "output_tokens": 11,
        "ttft_s": 0.5,
        "e2el_s": 1.5,
        "tpot_s": 0.1,
        "tokens_by_precision": {"fp16": 18, "fp8": 0},
    }
    return RequestRecord(**{**base, **values})


seconds = st.floats(1e-4, 1e3)


counts = st.none() | st.builds(lambda fp16, fp8: {"fp16": fp16, "fp8": fp8}, *[st.integers(0, 99)] * 2)
rows = st.tuples(seconds, seconds, st.integers(1, 50), st.booleans(), st.booleans(), counts)


def answered(index: int, row: tuple[float, float, int, bool, bool, dict[str, int] | None]) -> RequestRecord:
    ttft, decode, output, ok, strict, tokens = row
    return record(
        index,
        ok=ok,
        status=200 if ok else None,
        error=None if ok else f"failure {output % 3}",
        ttft_s=ttft,
        e2el_s=ttft + decode,
        tpot_s=decode / (output - 1) if output > 1 else None,
        output_tokens=output,
        ended_s=index + ttft + decode,
        precision_class="fp16" if strict else "any",
        tokens_by_precision=tokens,
    )


records = st.lists(rows, max_size=12).map(lambda made: [answered(*item) for item in enumerate(made)])


@given(records, seconds, seconds)
def test_goodput_and_attainment_are_counts_of_requests_within_the_slo(
    made: list[RequestRecord], ttft: float, tpot: float
) -> None:
    summary = summarize_records(made, Slo(ttft_s=ttft, tpot_s=tpot))
    met = []
    for item in made:
        assert item.ttft_s is not None
        assert item.e2el_s is not None
        assert item.output_tokens is not None
        decode = item.e2el_s - item.ttft_s
        slow = item.output_tokens > 1 and not decode / (item.output_tokens - 1) <= tpot
        # Near the limit, the sum and difference above may round to the other side of it.
        if item.tpot_s is not None and math.isclose(item.tpot_s, tpot, rel_tol=1e-6):
            return
        if item.ok and item.ttft_s <= ttft and not slow:
            met.append(item)
    if not made:
        assert summary["goodput_rps"] is None
        return
    assert summary["duration_s"] == max(item.ended_s for item in made)
    assert summary["goodput_rps"] == pytest.approx(len(met) / summary["duration_s"])
    for name, share in summary["attainment"].items():
        of_class = [item for item in made if item.precision_class == name]
        assert share == pytest.approx(sum(item in met for item in of_class) / len(of_class))


@given(records)
def test_counts_add_up(made: list[RequestRecord]) -> None:
    summary = summarize_records(made, Slo())
    counts = summary["requests"]
    assert counts["sent"] == len(made) == counts["ok"] + counts["failed"]
    assert counts["ok"] == sum(item.ok for item in made)
    assert sum(summary["errors"].values()) == counts["failed"]
    for mode in ("fp16", "fp8"):
        assert summary["tokens"][mode] == sum(
            item.tokens_by_precision[mode] for item in made if item.tokens_by_precision
        )
    whole = sum(summary["tokens"].values())
    assert summary["fp8_token_share"] == (summary["tokens"]["fp8"] / whole if whole else None)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@given(st.lists(seconds | st.none(), max_size=40))
def test_percentiles_interpolate_between_the_sorted_values(values: list[float | None]) -> None:
    got = distribution_ms(values)
    there = sorted(value * 1e3 for value in values if value is not None)
    assert got["n"] == len(there)
    if not there:
        assert got["p50"] is got["mean"] is None
        return
    for percentile in (50, 90, 99):
        place = percentile / 100 * (len(there) - 1)
        low, high = there[math.floor(place)], there[math.ceil(place)]
        assert got[f"p{percentile}"] == pytest.approx(low + (high - low) * (place - math.floor(place)))
    assert got["mean"] == pytest.approx(np.mean(there))


def test_only_complete_answers_count_in_latencies() -> None:
    summary = summarize_records([record(0), record(1, ok=False, ttft_s=99.0)], Slo())
    assert summary["ttft_ms"]["n"] == 1
    assert summary["ttft_ms"]["p99"] == pytest.approx(500)


def test_an_answer_of_one_token_has_no_tpot_but_can_be_good() -> None:
    single = record(0, output_tokens=1, tpot_s=None)
    summary = summarize_records([single], Slo(tpot_s=0.001))
    assert summary["tpot_ms"]["n"] == 0
    assert summary["attainment"] == {"any": 1.0}


@pytest.mark.parametrize(("gap_s", "attainment"), [(0.6, 0.0), (0.02, 1.0)])
def test_an_answer_without_usage_is_judged_by_the_gaps_between_its_chunks(
    gap_s: float, attainment: float
) -> None:
    uncounted = record(0, output_tokens=None, tpot_s=None, itl_s=[gap_s] * 99, e2el_s=0.5 + 99 * gap_s)
    summary = summarize_records([uncounted], Slo(tpot_s=0.033))
    assert summary["requests"]["without_usage"] == 1
    assert summary["tpot_ms"]["n"] == 0
    assert summary["attainment"] == {"any": attainment}


def test_a_limit_that_was_not_measured_is_not_met() -> None:
    assert not Slo(ttft_s=1.0).met_by(record(0, ttft_s=None))


def test_strict_requests_served_in_fp8_are_counted() -> None:
    broken = record(0, precision_class="fp16", tokens_by_precision={"fp16": 3, "fp8": 1})
    kept = record(1, precision_class="fp16")
    loose = record(2, tokens_by_precision={"fp16": 0, "fp8": 9})
    assert summarize_records([broken, kept, loose], Slo())["strict_in_fp8"] == 1


@pytest.mark.parametrize("bad", [{"ttft_s": 0}, {"tpot_s": "fast"}, {"ttft": 1}])
def test_a_bad_slo_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="slo"):
        Slo.from_dict(bad)


def test_summarize_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    made = [record(1), record(0, ok=False, error="x")]
    path.write_text("".join(json.dumps(item.to_dict()) + "\n" for item in made))
    assert read_requests(path) == [made[1], made[0]]
    summary = summarize(path, {"ttft_s": 1.0, "tpot_s": 0.2, "percentile": 90})
    assert summary == summarize_records(made[::-1], Slo(1.0, 0.2))


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not a JSON"), ("{}", "index")])
def test_a_broken_record_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(record(0).to_dict()) + "\n" + text + "\n")
    with pytest.raises(RecordError, match=rf"requests\.jsonl, line 2: .*{message}"):
        read_requests(path)


SAMPLES = (Sample(1, "a", "fp16"), Sample(2, "a", "fp16"), Sample(3, "a", "fp8"), Sample(4, "a", "fp16"))


def test_spans_follow_samples_and_flips_date_the_changes() -> None:
    flips = (Flip(2.25, "a", "fp16", "fp8"), Flip(9.0, "b", "fp8", "fp16"))
    timeline = Timeline(SAMPLES, flips)
    assert mode_spans(timeline, "a", 6) == [(1, 2.25, "fp16"), (2.25, 4, "fp8"), (4, 6, "fp16")]
    assert mode_spans(timeline, "b", 10) == [(0, 9, "fp8"), (9, 10, "fp16")]


def test_spans_are_cut_to_the_run() -> None:
    timeline = Timeline((Sample(-3, "a", "fp16"), Sample(5, "a", "fp8")))
    assert mode_spans(timeline, "a", 4) == [(0, 4, "fp16")]


def test_timeline_summary_counts_replica_seconds_and_fp8_share() -> None:
    timeline = Timeline(
        (Sample(0, "a", "fp16"), Sample(5, "a", "fp8"), Sample(5, "b", "fp16")),
        (Flip(4, "a", "fp16", "fp8"),),
    )
    assert summarize_timeline(timeline, 10) == {
        "flips": 1,
        "flips_to": {"fp8": 1},
        "replicas": 2,
        "replica_seconds": pytest.approx(15),
        "fp8_time_share": pytest.approx(6 / 15),
    }


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from(["fp16", "fp8"])), min_size=1, max_size=20))
def test_spans_tile_the_time_from_the_first_sample(points: list[tuple[float, str]]) -> None:
    samples = sorted((Sample(t, "a", mode) for t, mode in points), key=lambda sample: sample.t)
    spans = mode_spans(Timeline(tuple(samples)), "a", 50.0)
    assert sum(end - start for start, end, _ in spans) == pytest.approx(max(0.0, 50.0 - samples[0].t))
    for (_, end, mode), (start, _, other) in pairwise(spans):
        assert end == start
        assert mode != other


def test_timeline_file_is_read_and_broken_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    flip = {"t": 2, "kind": "flip", "replica": "a", "from": "fp16", "to": "fp8", "reason": "queue",
            "signal": "waiting", "value": 9, "threshold": 4}  # fmt: skip
    sample = {"t": 1, "kind": "sample", "replica": "a", "mode": "fp16", "running": 3, "waiting": 1, "more": 1}
    path.write_text(f"{json.dumps(flip)}\n{json.dumps(sample)}\n")
    timeline = read_timeline(path)
    assert timeline.samples == (Sample(1, "a", "fp16", 3, 1),)
    assert timeline.flips == (Flip(2, "a", "fp16", "fp8", "queue", "waiting", 9, 4),)
    for line, message in [({"kind": "x"}, "kind is 'x'"), ({"kind": "sample", "t": 1}, "replica")]:
        path.write_text(json.dumps(line))
        with pytest.raises(RecordError, match=f"line 1: .*{message}"):
            read_timeline(path)
