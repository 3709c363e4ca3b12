"""Writes the tables of measurements into README.md and the pages in docs/ from the JSON in bench/data.

    python bench/tables.py [--check]

Nothing in the tables is typed: each is a function of one data file. `--check` fails where a page is stale.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_tables import dates, engine, engine_summary, engine_tests, live

from nestedfp.kernels.rowfile import slug
from nestedfp.kernels.shapes import SHAPES, TOKEN_GROUPS, TOKENS
from nestedfp.loadtests.markdown import markdown
from nestedfp.loadtests.report import beside_static
from nestedfp.loadtests.table import rows as run_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data"
BEGIN, END = "<!-- tables: begin (make tables) -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Contest:
    """A row of the kernel table: `mode` and `dtype` over `baseline`.

    baseline: a name in the file, `BETTER_FP8` for the faster of the FP8 baselines in each cell, or
    `OUR_FP16` for our own product in float16. bars: what each group of M is to reach, as (geometric mean,
    worst). speed_up: show how many times faster instead of the share of the time.
    """

    title: str
    mode: str
    dtype: str
    baseline: str
    bars: tuple[str, str, str]
    speed_up: bool = False


BETTER_FP8, OUR_FP16 = "better FP8", "our float16"
_FP8_BASELINES = ("torch-scaled-mm", "vllm-cutlass")
_NO_BARS = ("", "", "")
_SPEED_UPS, _FP8_BARS = ("≥ 1.6", "≥ 1.6", "≥ 1.75"), ("≤ 1.00 (1.05)",) * 3

CONTESTS = (
    Contest(
        "16-bit mode, FP16: time over cuBLAS FP16", "16-bit", "float16", "cublas-16bit",
        ("≤ 1.00 (1.10)", "≤ 1.03 (1.12)", "≤ 1.02 (1.06)"),
    ),
    Contest("16-bit mode, BF16: time over cuBLAS BF16", "16-bit", "bfloat16", "cublas-16bit", _NO_BARS),
    Contest("16-bit mode, BF16: time over FP16", "16-bit", "bfloat16", OUR_FP16, ("≤ 1.02",) * 3),
    Contest(
        "FP8 mode, FP16: speed-up over cuBLAS FP16", "fp8", "float16", "cublas-16bit", _SPEED_UPS,
        speed_up=True,
    ),
    Contest("FP8 mode, FP16: time over the better FP8 baseline", "fp8", "float16", BETTER_FP8, _FP8_BARS),
    Contest("… over row-wise `torch._scaled_mm`", "fp8", "float16", "torch-scaled-mm", _NO_BARS),
    Contest("… over vLLM's `cutlass_scaled_mm`", "fp8", "float16", "vllm-cutlass", _NO_BARS),
    Contest(
        "FP8 mode, BF16: speed-up over cuBLAS BF16", "fp8", "bfloat16", "cublas-16bit", _SPEED_UPS,
        speed_up=True,
    ),
    Contest("FP8 mode, BF16: time over the better FP8 baseline", "fp8", "bfloat16", BETTER_FP8, _FP8_BARS),
)  # fmt: skip


def kernels(data: Mapping[str, Any]) -> str:
    """Each contest over each group of M, with its bars, from `nestedfp bench kernels`."""
    rows = []
    for contest in CONTESTS:
        cells = [_cell(contest, _ratios(data["rows"], contest, group)) for group in TOKEN_GROUPS.values()]
        if any(cells):
            barred = zip(cells, contest.bars, strict=True)
            rows.append([contest.title, *(_with_bar(cell or "not measured", bar) for cell, bar in barred)])
    header = data["header"]
    days = dates(data["rows"], header["date"])
    machine = f"{header['device']}, torch {header['torch']}, triton {header['triton']}, {days}"
    return (
        f"**GEMM kernels** ({machine}). Geometric mean (worst) over the layers of four models, beside the "
        f"bar; FP8 times include quantising the activations. {header['method']}\n\n"
        + markdown(["", *TOKEN_GROUPS], rows)
    )


def by_shape(data: Mapping[str, Any]) -> str:
    """The pictures, and each contest over a library in every cell, from `nestedfp bench kernels`."""
    header = data["header"]
    name = slug(header["device"])
    parts = [
        f"**Every product** ({header['device']}, {dates(data['rows'], header['date'])}). Weights N x K down, "
        "M across.",
        f"![Time over the floor of each product, by M](kernels-{name}-floor.svg)",
        f"![TFLOP/s and TB/s of each product, by M](kernels-{name}-rates.svg)",
    ]
    sizes: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in data["rows"]:
        sizes.setdefault((row["N"], row["K"]), []).append(row)
    counts = sorted({row["M"] for row in data["rows"]})
    for contest in CONTESTS:
        if contest.baseline not in ("cublas-16bit", BETTER_FP8):
            continue
        rows = [
            [f"{N} x {K}", *(_mean(contest, _ratios(taken, contest, (M,))) for M in counts)]
            for (N, K), taken in sizes.items()
        ]
        parts += [f"{contest.title}:", markdown(["", *map(str, counts)], rows)]
    return "\n\n".join(parts)


OTHER_TOKENS = {
    "M up to 64": range(1, 65), "65 … 256": range(65, 257), "257 … 1023": range(257, 1024),
    "1024 … 8192": range(1024, 8193),
}  # fmt: skip


def other_shapes(data: Mapping[str, Any]) -> str:
    """Contests over products that the kernels' table has no row for, from `nestedfp bench kernels --out`."""
    tabled = {(shape.N, shape.K) for shape in SHAPES}
    rows = [row for row in data["rows"] if (row["N"], row["K"]) not in tabled or row["M"] not in TOKENS]
    weights = sorted({(row["N"], row["K"]) for row in rows})
    counts = sorted({row["M"] for row in rows})
    shown = [
        [contest.title, *cells]
        for contest in CONTESTS
        if any(cells := [_cell(contest, _ratios(rows, contest, group)) for group in OTHER_TOKENS.values()])
    ]
    header = data["header"]
    return (
        f"**Products outside the kernels' table** ({header['device']}, torch {header['torch']}, "
        f"{dates(data['rows'], header['date'])}; passes: {_passes(data['rows'])}). "
        f"Geometric mean (worst) over weights of N x K = "
        f"{', '.join(f'{N} x {K}' for N, K in weights)} at M = {', '.join(map(str, counts))}; of the weights "
        f"that the table holds, other M alone. {header['method']}\n\n" + markdown(["", *OTHER_TOKENS], shown)
    )


def _passes(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many of them the rows of each mode are the median of."""
    found = sorted({(row["mode"], row["passes"]) for row in rows})
    return ", ".join(f"{passes} ({mode})" for mode, passes in found)


def gated(data: Mapping[str, Any]) -> str:
    """Gated products over each baseline and group of M, from `bench/gated.py`."""
    shown = []
    for mode, dtype, baseline in dict.fromkeys(
        (row["mode"], row["dtype"], row["baseline"]) for row in data["rows"]
    ):
        cells = []
        for group in TOKEN_GROUPS.values():
            ratios = [
                row["ratio"]
                for row in data["rows"]
                if (row["mode"], row["dtype"], row["baseline"]) == (mode, dtype, baseline)
                and row["M"] in group
            ]
            cells.append(_mean_and_worst(ratios))
        shown.append([f"{mode}, {dtype}: time over {baseline}", *cells])
    header = data["header"]
    machine = f"{header['device']}, torch {header['torch']}, {header['date'][:10]}"
    counts = ", ".join(map(str, sorted({row["M"] for row in data["rows"]})))
    return (
        f"**Gated products** ({machine}). silu(gate) * up as part of the product, over the product and a "
        "kernel for it. Geometric mean (worst) over the gate_up layers of four models at M = "
        f"{counts}. {header['method']}\n\n" + markdown(["", *TOKEN_GROUPS], shown)
    )


def _with_bar(cell: str, bar: str) -> str:
    return f"{cell}; bar {bar}" if bar else cell


def _cell(contest: Contest, ratios: Sequence[float]) -> str:
    if contest.speed_up and ratios:
        return f"{1 / statistics.geometric_mean(ratios):.2f} ({1 / max(ratios):.2f})"
    return _mean_and_worst(ratios)


def _mean(contest: Contest, ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    mean = statistics.geometric_mean(ratios)
    return f"{1 / mean if contest.speed_up else mean:.2f}"


def _mean_and_worst(ratios: Sequence[float]) -> str:
    return f"{statistics.geometric_mean(ratios):.2f} ({max(ratios):.2f})" if ratios else ""


def _ratios(rows: Sequence[Mapping[str, Any]], contest: Contest, group: Container[int]) -> list[float]:
    """Time over the baseline's, one number a layer and M that both were timed at."""
    taken = [row for row in rows if row["M"] in group and row["mode"] == contest.mode]
    ours = {_place(row): row["us"] for row in taken if row["dtype"] == contest.dtype}
    theirs: dict[tuple[Any, ...], float] = {}
    for row in taken:
        if contest.baseline == OUR_FP16:
            if row["dtype"] == "float16":
                theirs[_place(row)] = row["us"]
        elif row["dtype"] == contest.dtype and row["baseline"] in _names(contest.baseline):
            theirs[_place(row)] = min(row["baseline_us"], theirs.get(_place(row), math.inf))
    return [us / theirs[place] for place, us in ours.items() if place in theirs]


def _names(baseline: str) -> tuple[str, ...]:
    return _FP8_BASELINES if baseline == BETTER_FP8 else (baseline,)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["layer"], row["M"]


def kernel_tests(data: Mapping[str, Any]) -> str:
    """One line: what passed on which machine, from `bench/kernel_tests.py`."""
    header = data["header"]
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(data["totals"].items()))
    if not data["complete"]:
        outcomes += ", and the run was cut off"
    return (
        f"**Tests of the kernels on a GPU** ({header['device']}, torch {header['torch']}, triton "
        f"{header['triton']}, {header['date'][:10]}): {outcomes}."
    )


def cpu_decode(data: Mapping[str, Any]) -> str:
    """vLLM's speed on a CPU, from `bench/cpu_decode.py`."""
    rows = []
    for case in data["cases"]:
        what = "decode" if case["metric"].startswith("decode") else f"prefill of {case['prompt']} tokens"
        rates = [f"{case['tokens_per_s'][name]['median']:.0f}" for name in ("plain", "fp16", "fp8")]
        ratios = [_with_spread(case[name]) for name in ("fp16_over_plain", "fp8_over_fp16")]
        rows.append([f"{what}, batch {case['batch']}", *rates, *ratios])
    machine = ", ".join(f"{name} {value}" for name, value in data["machine"].items())
    return (
        f"**vLLM on a CPU** ({data['model']}, one thread, {machine}). "
        f"Tokens/s, medians of {data['rounds']} rounds; ratios within a round, with their spread.\n\n"
        + markdown(["", "plain vLLM", "NestedFP FP16", "NestedFP FP8", "FP16 / plain", "FP8 / FP16"], rows)
    )


def _with_spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def demo(data: Mapping[str, Any]) -> str:
    """The demonstration under the policy beside static precisions, kept by `bench/demo.py`."""
    runs = beside_static(data, "policy")
    *static, _ = runs
    device = data["machine"].get("device", data["machine"]["processor"])
    slo = f"TTFT {data['slo']['ttft_s']:g} s, TPOT {data['slo']['tpot_s'] * 1e3:g} ms"
    rows = [
        [row.label.strip(), *row.values, "" if row.ratio is None else f"{row.ratio:.2f}"]
        for row in run_rows(runs)
        if row.label.strip() in DEMO_ROWS
    ]
    return (
        f"**The demonstration** ({data['model']}, {data['engine']}, replicas: {data['replicas']}, {device}, "
        f"{data['date']}). Trace: {data['trace']['history'][0]}; once in {', once in '.join(static)} and "
        f"once under the policy; SLO: {slo}. "
        "The ratio is the policy's over static FP16's. Flips are changes of a replica's mode; within `auto` "
        "the engine changes precision from step to step, which they do not count.\n\n"
        + markdown(["", *runs, "ratio"], rows)
    )


DEMO_ROWS = {
    "requests sent", "failed", "TTFT p50", "TTFT p90", "TPOT p50", "TPOT p90", "goodput under the SLO",
    "SLO met, class any", "tokens in FP16", "tokens in FP8", "flips",
}  # fmt: skip

Table = Callable[[Mapping[str, Any]], str]
PAGES: dict[str, dict[str, Table]] = {
    "README.md": {
        "kernels-*-h100-*.json": kernels,
        "engine-*-h100-*.json": engine_summary,
        "tensor-parallel-*.json": engine_summary,
        "live-*.json": live,
    },
    "docs/kernels.md": {"kernels-*.json": by_shape},
    "docs/measured.md": {
        "kernels-*-h200.json": kernels,
        "engine-*.json": engine,
        "tensor-parallel-*.json": engine,
        "vllm-tests-*.json": engine_tests,
        "other-shapes-*.json": other_shapes,
        "gated-*.json": gated,
        "kernel-tests-*.json": kernel_tests,
        "cpu-decode-*.json": cpu_decode,
        "demo-*.json": demo,
    },
}
"""By page the tables it shows, each with the files it is made from."""


def tables(folder: Path, wanted: Mapping[str, Table]) -> str:
    """The tables that the data in `folder` allows, as Markdown."""
    made = [
        table(json.loads(path.read_text()))
        for pattern, table in wanted.items()
        for path in sorted(folder.glob(pattern))
    ]
    return "\n\n".join(made)


def with_tables(page: str, text: str) -> str:
    """`page` with `text` between its markers; ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, shown in PAGES.items():
        page = (ROOT / name).read_text()
        wanted = with_tables(page, tables(DATA, shown))
        if wanted == page:
            continue
        stale.append(name)
        if not check:
            (ROOT / name).write_text(wanted)
    if check and stale:
        print(f"{', '.join(stale)}: not the data in bench/data; run `make tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
