"""Draws `nestedfp bench engine` into docs/: throughput over batch for the four contenders.

    python bench/engine_plot.py

Reads bench/data/engine-<device>.json, writes docs/engine-<device>.svg: a panel for each dtype and lengths,
the median of the passes as a line and their spread as a band. Files with one contender only are left out.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA, DOCS = ROOT / "bench" / "data", ROOT / "docs"

Row = Mapping[str, Any]
Lengths = tuple[str, int, int]
"""dtype, input length, output length."""

CONTENDERS = {
    "vllm-16bit": ("vLLM, 16 bits", "#808080"),
    "nestedfp-16bit": ("NestedFP, 16-bit mode", "#1f5fa8"),
    "vllm-fp8": ("vLLM, online FP8", "#b9a04a"),
    "nestedfp-fp8": ("NestedFP, FP8 mode", "#c8501e"),
}


def panels_of(rows: Sequence[Row]) -> dict[Lengths, dict[str, list[Row]]]:
    """By lengths and contender, the rows in the order of their batch."""
    found: dict[Lengths, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        lengths = (row["dtype"], row["input_len"], row["output_len"])
        found.setdefault(lengths, {}).setdefault(row["contender"], []).append(row)
    return dict(sorted(found.items()))


def draw(data: Mapping[str, Any]) -> Any:
    panels = panels_of(data["rows"])
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, ((dtype, input_len, output_len), contenders) in zip(axes.flat, panels.items(), strict=True):
        for name, (label, colour) in CONTENDERS.items():
            rows = contenders.get(name, [])
            batches = [row["batch"] for row in rows]
            axis.plot(batches, [row["tokens_per_s"] for row in rows], ".-", color=colour, label=label)
            low, high = ([row[f"tokens_per_s_{end}"] for row in rows] for end in ("min", "max"))
            axis.fill_between(batches, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{dtype}, {input_len} tokens in, {output_len} out", fontsize=9)
        axis.grid(True, which="both", linewidth=0.3)
        axis.tick_params(labelsize=7)
    figure.supxlabel("batch", fontsize=9)
    figure.supylabel("output tokens/s", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.01, 0.01, 1, 0.93))
    return figure


def main() -> int:
    mpl.rcParams |= {"svg.hashsalt": "nestedfp", "svg.fonttype": "none"}
    for path in sorted(DATA.glob("engine-*.json")):
        data = json.loads(path.read_text())
        if len({row["contender"] for row in data["rows"]} & {"vllm-16bit", "nestedfp-16bit"}) < 2:
            print(f"{path.name}: no plain vLLM beside NestedFP, no plot", file=sys.stderr)
            continue
        out = DOCS / f"{path.stem}.svg"
        figure = draw(data)
        figure.savefig(out, metadata={"Date": None})
        plt.close(figure)
        print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
