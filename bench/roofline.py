"""Draws the kernel benchmark into docs/: how far each product is from its floor, and the rates it reaches.

    python bench/roofline.py

Reads bench/data/kernels-<device>.json, writes docs/kernels-<device>-{floor,rates}.svg. The floor of a product
is the larger of its fewest bytes over the measured copy bandwidth and its operations over the rate of a large
library product, both from the file's header; files without them are left out.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.shapes import traffic

ROOT = Path(__file__).resolve().parent.parent
DATA, DOCS = ROOT / "bench" / "data", ROOT / "docs"

Row = Mapping[str, Any]
Series = tuple[str, str, Callable[[Row], bool], Callable[[Row], float]]
"""Label, colour, which rows, and the microseconds of one."""

_COLUMNS = 4
_COLOURS = {"16-bit": "#1f5fa8", "fp8": "#c8501e", "cublas": "#808080", "fp8 baseline": "#b9a04a"}


def series() -> list[Series]:
    """Our two products and the best of what they are compared with, in float16."""

    def rows_of(mode: str, baseline: str) -> Callable[[Row], bool]:
        return lambda row: (row["mode"], row["baseline"]) == (mode, baseline)

    best = "vllm-cutlass", "torch-scaled-mm"
    return [
        (
            "cuBLAS FP16",
            _COLOURS["cublas"],
            rows_of("16-bit", "cublas-16bit"),
            lambda row: row["baseline_us"],
        ),
        (
            "FP8 baseline, the better one",
            _COLOURS["fp8 baseline"],
            lambda row: row["mode"] == "fp8" and row["baseline"] in best,
            lambda row: row["baseline_us"],
        ),
        ("16-bit mode", _COLOURS["16-bit"], rows_of("16-bit", "cublas-16bit"), lambda row: row["us"]),
        ("FP8 mode", _COLOURS["fp8"], rows_of("fp8", "cublas-16bit"), lambda row: row["us"]),
    ]


def points(rows: Sequence[Row], chosen: Series) -> dict[int, float]:
    """M to the least microseconds that the chosen rows of one [N, K] have."""
    _, _, belongs, microseconds = chosen
    found: dict[int, float] = {}
    for row in filter(belongs, rows):
        found[row["M"]] = min(microseconds(row), found.get(row["M"], float("inf")))
    return dict(sorted(found.items()))


def floor_us(mode: Mode, M: int, N: int, K: int, ceilings: Mapping[str, float]) -> float:
    """The least microseconds a product of this size can take on the measured machine."""
    rate = ceilings["fp8_tflop_s" if mode is Mode.FP8 else "float16_tflop_s"]
    return max(traffic(mode, M, N, K) / ceilings["copy_tb_s"], 2 * M * N * K / rate) / 1e6


def by_size(rows: Sequence[Row]) -> dict[tuple[int, int], list[Row]]:
    sizes: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row["dtype"] == "float16":
            sizes.setdefault((row["N"], row["K"]), []).append(row)
    return sizes


def panels(rows: Sequence[Row], draw: Callable[[Axes, tuple[int, int], list[Row]], None], label: str) -> Any:
    """A figure with a panel for each [N, K], M along the bottom."""
    sizes = by_size(rows)
    height = -(-len(sizes) // _COLUMNS)
    figure, axes = plt.subplots(
        height, _COLUMNS, figsize=(3.1 * _COLUMNS, 2.4 * height), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(sizes) :]:
        axis.set_axis_off()
    for axis, (size, found) in zip(axes.flat, sizes.items(), strict=False):
        draw(axis, size, found)
        layers = sorted({f"{row['model']} {row['layer']}" for row in found})
        axis.set_title(f"N {size[0]}, K {size[1]}\n" + "\n".join(layers), fontsize=7)
        axis.set_xscale("log", base=2)
        axis.grid(True, linewidth=0.3)
        axis.tick_params(labelsize=7)
    figure.supxlabel("tokens M", fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.96))
    return figure


def over_floor(data: Mapping[str, Any]) -> Any:
    """Time over the floor of its own mode: 1 is the roof."""

    def draw(axis: Axes, size: tuple[int, int], rows: list[Row]) -> None:
        for chosen in series():
            mode = Mode.FP8 if "FP8" in chosen[0] else Mode.BITS16
            taken = points(rows, chosen)
            ratios = [us / floor_us(mode, M, *size, data["header"]["ceilings"]) for M, us in taken.items()]
            axis.plot(list(taken), ratios, color=chosen[1], label=chosen[0], linewidth=1.2, marker=".")
        axis.axhline(1.0, color="black", linewidth=0.6)
        axis.set_ylim(0.8, 2.6)

    return panels(data["rows"], draw, "time over the floor of its precision")


def rates(data: Mapping[str, Any]) -> Any:
    """TFLOP/s on the left, solid; TB/s on the right, dotted."""

    def draw(axis: Axes, size: tuple[int, int], rows: list[Row]) -> None:
        N, K = size
        right = axis.twinx()
        right.set_ylim(0, 4)
        right.tick_params(labelsize=7)
        for chosen in series():
            mode = Mode.FP8 if "FP8" in chosen[0] else Mode.BITS16
            taken = points(rows, chosen)
            tflops = [2 * M * N * K / us / 1e6 for M, us in taken.items()]
            tbytes = [traffic(mode, M, N, K) / us / 1e6 for M, us in taken.items()]
            axis.plot(list(taken), tflops, color=chosen[1], label=chosen[0], linewidth=1.2)
            right.plot(list(taken), tbytes, color=chosen[1], linewidth=1.0, linestyle=":")

    return panels(data["rows"], draw, "TFLOP/s (solid); TB/s (dotted, right)")


FIGURES = {"floor": over_floor, "rates": rates}


def main() -> int:
    mpl.rcParams |= {"svg.hashsalt": "nestedfp", "svg.fonttype": "none"}
    for path in sorted(DATA.glob("kernels-*.json")):
        data = json.loads(path.read_text())
        if "ceilings" not in data["header"]:
            print(f"{path.name}: no ceilings in its header, no plots", file=sys.stderr)
            continue
        for name, draw in FIGURES.items():
            out = DOCS / f"{path.stem}-{name}.svg"
            figure = draw(data)
            figure.savefig(out, metadata={"Date": None})
            plt.close(figure)
            print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
