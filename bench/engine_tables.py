"""Tables of the engine: throughput and what else was seen, its live load, and its tests on a GPU."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nestedfp.loadtests.markdown import markdown

ENGINE_CONTENDERS = ("vllm-16bit", "nestedfp-16bit", "vllm-fp8", "nestedfp-fp8")
# Ours over theirs, with the bar as geometric mean (worst).
ENGINE_RATIOS = (
    ("nestedfp-16bit", "vllm-16bit", "≥ 0.99 (0.96)"),
    ("nestedfp-fp8", "vllm-fp8", "≥ 1.00 (0.95)"),
    ("nestedfp-fp8", "vllm-16bit", "≥ 1.3"),
    ("nestedfp-fp8", "nestedfp-16bit", ""),
)
# What arXiv 2506.02024 reports for Llama-3.1-8B or, without a model of its own, for all: mean (worst).
PAPER = {
    ("nestedfp-16bit", "vllm-16bit"): "0.96",
    ("nestedfp-fp8", "vllm-fp8"): "0.95 to 1.0 (0.835)",
    ("nestedfp-fp8", "vllm-16bit"): "1.20",
}
# Where FP8 mode is to be faster still than plain 16 bits: short requests, small batches.
SMALL_BATCHES, SMALL_BATCH_BAR = ((128, 128), 32), {("nestedfp-fp8", "vllm-16bit"): "≥ 1.45"}

Cells = dict[tuple[int, int, int], dict[str, float]]


class Measured:
    """The throughputs of `nestedfp bench engine`, by model and dtype, then by cell and contender."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.runs: dict[tuple[str, str], Cells] = {}
        self.spreads: dict[tuple[str, str], Cells] = {}
        self.fused: set[tuple[tuple[str, str], tuple[int, int, int]]] = set()
        """Runs and cells whose rows say that MLPs were fused."""
        for row in data["rows"]:
            run, cell = (row["model"], row["dtype"]), (row["input_len"], row["output_len"], row["batch"])
            self.runs.setdefault(run, {}).setdefault(cell, {})[row["contender"]] = row["tokens_per_s"]
            if row.get("fused_mlps"):
                self.fused.add((run, cell))
            if (spread := _spread(row)) is not None:
                self.spreads.setdefault(run, {}).setdefault(cell, {})[row["contender"]] = spread
        seen = {name for cells in self.runs.values() for found in cells.values() for name in found}
        self.names = [name for name in ENGINE_CONTENDERS if name in seen]
        self.missing = [name for name in ENGINE_CONTENDERS if name not in seen]
        self.pairs = [pair for pair in ENGINE_RATIOS if pair[0] in seen and pair[1] in seen]

    def labelled(self) -> list[tuple[str, tuple[str, str], Cells]]:
        """Every run with what it is called in a table, float16 first."""
        several = len({model for model, _ in self.runs}) > 1
        ordered = sorted(self.runs.items(), key=lambda run: run[0][::-1], reverse=True)
        return [(f"{run[0]}, {run[1]}" if several else run[1], run, cells) for run, cells in ordered]

    @property
    def machine(self) -> str:
        data = self.data
        models = ", ".join(dict.fromkeys(model for model, _ in self.runs))
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        return f"{models}, {data['device']}, {versions}, {_dates(data)}{_cards(data)}"

    @property
    def ratio_names(self) -> list[str]:
        return [f"{ours} / {theirs}" for ours, theirs, _ in self.pairs]


def engine(data: Mapping[str, Any]) -> str:
    """Throughput of the contenders in every cell, from `nestedfp bench engine`."""
    measured = Measured(data)
    names, pairs = measured.names, measured.pairs
    rows = []
    for label, run, cells in measured.labelled():
        within = measured.spreads.get(run, {})
        rows += [
            [
                f"{label}, {into}/{out}, batch {batch}{'*' * ((run, (into, out, batch)) in measured.fused)}",
                *(_rate(found.get(name), within.get((into, out, batch), {}).get(name)) for name in names),
                *(_ratio(found, *pair) for pair in pairs),
            ]
            for (into, out, batch), found in sorted(cells.items())
        ]
    return (
        f"**Engine, every cell** ({measured.machine}). Output tokens/s, input/output length"
        + ("; medians, ± half the range of the passes over the median" if measured.spreads else "")
        + (f"; not measured in this run: {', '.join(measured.missing)}" if measured.missing else "")
        + ("; * with fused MLPs" if measured.fused else "")
        + ".\n\n"
        + markdown(["", *names, *measured.ratio_names], rows)
    )


def engine_summary(data: Mapping[str, Any]) -> str:
    """Ratios over all cells of each dtype beside their bars, and what else was seen of flips and memory."""
    measured = Measured(data)
    pairs = measured.pairs
    rows = []
    for label, _, cells in measured.labelled():
        means = [_mean_ratio(cells.values(), *pair) for pair in pairs]
        rows.append([f"{label}, {len(cells)} cells: geometric mean (worst)", *means])
        few = [found for (*lengths, batch), found in cells.items() if _few(tuple(lengths), batch)]
        least = [_least_ratio(few, ours, theirs) for ours, theirs, _ in pairs]
        rows.append([f"{label}: worst of 128/128, batch 1 to 32", *least])
    rows.append(
        ["the NestedFP paper, on its own baselines"]
        + [PAPER.get((ours, theirs), "") for ours, theirs, _ in pairs]
    )
    return (
        f"**Engine**, random weights ({measured.machine}). Output tokens/s of one engine over another's.\n\n"
        + markdown(["", *measured.ratio_names], rows)
        + _flips_and_memory(data, [dtype for _, dtype in measured.runs])
    )


def _dates(data: Mapping[str, Any]) -> str:
    entries = [entry for name in ("rows", "engines", "solo", "profiles") for entry in data.get(name, [])]
    return dates(entries, data["date"])


def dates(entries: Sequence[Mapping[str, Any]], last: str) -> str:
    """The days of what was measured; that of the last run where nothing has a date of its own."""
    days = sorted({entry["date"][:10] for entry in entries if "date" in entry})
    if not days:
        return last[:10]
    first_to_last = " to ".join(dict.fromkeys((days[0], days[-1])))
    return f"{first_to_last} and before" if any("date" not in entry for entry in entries) else first_to_last


def _cards(data: Mapping[str, Any]) -> str:
    """The GPUs that each engine was spread over, where it was more than one."""
    ranks = data.get("settings", {}).get("tensor_parallel_size", 1)
    return f", {ranks} GPUs" if ranks > 1 else ""


def _few(lengths: tuple[int, ...], batch: int) -> bool:
    return (lengths, True) == (SMALL_BATCHES[0], batch <= SMALL_BATCHES[1])


def _ratio(found: Mapping[str, float], ours: str, theirs: str, bar: str) -> str:
    return f"{found[ours] / found[theirs]:.2f}" if ours in found and theirs in found else ""


def _ratios_of(cells: Iterable[Mapping[str, float]], ours: str, theirs: str) -> list[float]:
    return [found[ours] / found[theirs] for found in cells if ours in found and theirs in found]


def _mean_ratio(cells: Iterable[Mapping[str, float]], ours: str, theirs: str, bar: str) -> str:
    ratios = _ratios_of(cells, ours, theirs)
    if not ratios:
        return ""
    return _barred(f"{statistics.geometric_mean(ratios):.3f} ({min(ratios):.3f})", bar)


def _least_ratio(cells: Iterable[Mapping[str, float]], ours: str, theirs: str) -> str:
    ratios = _ratios_of(cells, ours, theirs)
    return _barred(f"{min(ratios):.3f}", SMALL_BATCH_BAR.get((ours, theirs), "")) if ratios else ""


def _barred(shown: str, bar: str) -> str:
    return f"{shown}; bar {bar}" if bar else shown


def _flips_and_memory(data: Mapping[str, Any], dtypes: Iterable[str]) -> str:
    """What the runs of each dtype saw of flips, memory and starts, beside the bars; empty where nothing."""
    columns = {dtype: found for dtype in sorted(set(dtypes), reverse=True) if (found := _seen(data, dtype))}
    named = {name: bar for found in columns.values() for name, (_, bar) in found.items()}
    rows = [
        [name, *(found.get(name, ("not measured",))[0] for found in columns.values()), bar]
        for name, bar in named.items()
    ]
    return "\n\n" + markdown(["flips, memory and starts", *columns, "bar"], rows) if rows else ""


def _seen(data: Mapping[str, Any], dtype: str) -> dict[str, tuple[str, str]]:
    """Of one dtype: each figure and its bar, by name."""
    engines, solo = (
        {entry["engine"]: entry for entry in data[kind] if entry.get("dtype", dtype) == dtype}
        for kind in ("engines", "solo")
    )
    found, figures = engines.get("nestedfp", {}), {}
    if checks := found.get("checks"):
        step = checks["step_ms"]
        slowed = f"{2 * step['flipping'] / (step['fp16'] + step['fp8']):.3f}"
        tokens = "equal" if checks["fp16_tokens_equal_after_flips"] else "not equal"
        figures = {
            f"swap of graphs, p99 of {checks['flips']:,} flips": (
                f"{checks['flip_us_p99']:.0f} us",
                "≤ 1,000 us",
            ),
            "step with a flip before it, over the mean of both modes": (slowed, "≤ 1.02"),
            "greedy 16-bit tokens before and after the flips": (tokens, "equal"),
        }
    plain = solo.get("vllm-16bit") or engines.get("vllm-16bit")
    ours = solo.get("nestedfp") or found
    if ours and plain:
        ratio = ours["memory"]["weights_bytes"] / plain["memory"]["weights_bytes"]
        figures["memory of weights over plain vLLM's"] = (f"{ratio:.4f}", "≤ 1.005")
    if "nestedfp" in solo and "vllm-16bit" in solo:
        (kept, there), (took, theirs) = (
            [entry[what] for entry in (solo["nestedfp"], solo["vllm-16bit"])]
            for what in ("memory", "start_s")
        )
        blocks = f"{kept['kv_blocks'] / there['kv_blocks']:.3f}"
        alike = f"the same setting{_captured(solo['nestedfp'])}"
        figures[f"KV-cache blocks at {alike}, over plain vLLM's"] = (blocks, "≥ 0.97")
        figures["start alone over plain vLLM's"] = (f"{took:.0f} s, {took / theirs:.2f}", "≤ 1.5")
    return figures


def _captured(entry: Mapping[str, Any]) -> str:
    """How many sizes it was to capture graphs of, where that was not left to vLLM."""
    sizes = entry.get("settings", {}).get("compilation_config", {}).get("cudagraph_capture_sizes")
    return f" ({len(sizes)} captured sizes)" if sizes else ""


def engine_tests(data: Mapping[str, Any]) -> str:
    """What the engine's tests found on a GPU, a row a run, from `bench/engine_tests.py`."""
    header = data["header"]
    rows = [
        [
            f"{run['model']}, {run['dtype']}, vLLM's runner {run['runner']}, {run['date'][:10]}",
            _outcomes(run),
            *(_figure(run, name) for name in TESTED),
            _of(run, "sizes_with_equal_logits", "sizes", "logits_equal"),
            _of(run, "ranks_alike", "", "ranks_alike"),
        ]
        for run in data["runs"]
    ]
    cards = f"{header['devices']} x " if header["devices"] > 1 else ""
    head = ["", "tests", *TESTED.values(), "16-bit logits with equal bits after flips", "ranks alike"]
    return (
        f"**Tests of the engine on a GPU** ({cards}{header['device']}, vllm {header['vllm']}, torch "
        f"{header['torch']}), every step checked on the device.\n\n" + markdown(head, rows)
    )


TESTED = {
    "flips": "flips under load",
    "failed_requests": "failed requests",
    "mixed_steps": "mixed steps",
    "flip_us_p99": "swap, p99 us",
}


def live(data: Mapping[str, Any]) -> str:
    """One load on one engine in four modes, beside the simulator, from `bench/live_engine.py`."""
    rows = [
        [
            row["contender"],
            f"{_percent(row['attainment'])} ({_percent(predicted['attainment'])})",
            f"{row['fp16_token_share']:.2f} ({predicted['fp16_token_share']:.2f})",
            *(f"{row[what]['p50']:.0f}, {row[what]['p99']:.0f}" for what in ("ttft_ms", "tpot_ms")),
            f"{row['bounded_steps']:,} of {row['steps']:,}",
            f"{row['flips']:,}",
        ]
        for row in data["rows"]
        for predicted in (data["simulated"][row["contender"]],)
    ]
    slo, sent = data["slo"], data["rows"][0]["requests"]["sent"]
    times = [f"{what} p50, p99, ms" for what in ("TTFT", "TPOT")]
    head = ["", "SLO met", "tokens in 16 bits", *times, "steps cut", "flips"]
    return (
        f"**A bursty load on one engine, live, without Ray Serve** ({data['model']}, {data['device']}, vllm "
        f"{data['versions']['vllm']}, {data['date'][:10]}). {sent:,} requests, arriving by the clock: "
        f"{data['load'][0]}. SLO: TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s'] * 1e3:g} ms; in brackets "
        "what the simulated engine, fitted to the engine's cells, predicts. Cut steps take no more tokens "
        "than the SLO leaves time for; flips are changes of precision from one step to the next.\n\n"
        + markdown(head, rows)
    )


def _outcomes(run: Mapping[str, Any]) -> str:
    if not run["complete"]:
        return "not finished"
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(run["outcomes"].items()))


def _figure(run: Mapping[str, Any], name: str) -> str:
    value = run.get("figures", {}).get(name)
    return "" if value is None else f"{value:,.0f}"


def _of(run: Mapping[str, Any], part: str, whole: str, flag: str) -> str:
    """`part` of `whole` batch sizes, or a yes or no."""
    figures = run.get("figures", {})
    if whole in figures:
        return f"{figures[part]:.0f} of {figures[whole]:.0f} batch sizes"
    return "" if flag not in figures else "yes" if figures[flag] else "no"


def _spread(row: Mapping[str, Any]) -> float | None:
    """Half the range of the passes over their median; None where there was but one, or it is not known."""
    if row.get("passes", 1) < 2:
        return None
    return float(row["tokens_per_s_max"] - row["tokens_per_s_min"]) / 2 / float(row["tokens_per_s"])


def _rate(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.0f}" if spread is None else f"{value:,.0f} ±{_percent(spread)}"


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")
