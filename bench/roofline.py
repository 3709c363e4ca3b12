"""Draws the kernel benchmark into docs/: how far each product is from its floor, and the rates it reaches.

    python bench/roofline.py

Reads bench/data/kernels-<device>.json, writes docs/kernels-<device>-{floor,rates}.svg. The floor of a product
is the larger of its fewest bytes over the memory's bandwidth and its operations over the tensor cores' rate,
both as the vendor states them. A measured copy, which writes as much as it reads, is no floor: products
mostly read, and are up to a quarter faster. Files of devices without a datasheet here are left out.
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
DATASHEETS = {
    "NVIDIA H100 80GB HBM3": {"tb_s": 3.35, "16-bit": 989.4, "fp8": 1978.9},
    "NVIDIA H200": {"tb_s": 4.8, "16-bit": 989.4, "fp8": 1978.9},
}
"""By device the memory's bandwidth, and each mode's dense TFLOP/s at the boost clock: H100 SXM, H200 SXM."""
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


def floor_us(mode: Mode, M: int, N: int, K: int, datasheet: Mapping[str, float]) -> float:
    """The least microseconds that a product of this size could take on the device of the datasheet."""
    return max(traffic(mode, M, N, K) / datasheet["tb_s"], 2 * M * N * K / datasheet[mode]) / 1e6


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
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.96))
    return figure


def over_floor(data: Mapping[str, Any]) -> Any:
    """Time over the floor of its own mode, 1 is the roof; and that of the measured copy."""
    header = data["header"]
    datasheet, copy_tb_s = DATASHEETS[header["device"]], header["ceilings"]["copy_tb_s"]

    def draw(axis: Axes, size: tuple[int, int], rows: list[Row]) -> None:
        for chosen in series():
            mode = Mode.FP8 if "FP8" in chosen[0] else Mode.BITS16
            taken = points(rows, chosen)
            ratios = [us / floor_us(mode, M, *size, datasheet) for M, us in taken.items()]
            axis.plot(list(taken), ratios, color=chosen[1], label=chosen[0], linewidth=1.2, marker=".")
        copy = {"label": f"copy, measured: {copy_tb_s:.2f} TB/s", "linestyle": "--"}
        axis.axhline(datasheet["tb_s"] / copy_tb_s, color="black", linewidth=0.6, **copy)

    label = f"time over the floor of its precision ({datasheet['tb_s']} TB/s by datasheet)"
    figure = panels(data["rows"], draw, label)
    # All panels share the axis, whose top is known when all are drawn.
    figure.axes[0].set_ylim(bottom=1.0)
    return figure


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
        header = data["header"]
        if header["device"] not in DATASHEETS or "ceilings" not in header:
            print(f"{path.name}: no datasheet of its device, or no ceilings, so no plots", file=sys.stderr)
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
