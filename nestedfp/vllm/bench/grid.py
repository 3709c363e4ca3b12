"""Who is measured, and on what: the contenders, the engines behind them, the cells of the grid."""

import argparse

Cell = tuple[int, int, int]
"""Input length, output length, batch."""

ENGINES = ("vllm-16bit", "nestedfp", "vllm-fp8")

CONTENDERS = {
    "vllm-16bit": ("vllm-16bit", None),
    "nestedfp-16bit": ("nestedfp", "fp16"),
    "nestedfp-fp8": ("nestedfp", "fp8"),
    "vllm-fp8": ("vllm-fp8", None),
}
"""Contender -> its engine, and the target that is set there."""

RATIOS = (
    ("nestedfp-16bit", "vllm-16bit"),
    ("nestedfp-fp8", "vllm-fp8"),
    ("nestedfp-fp8", "vllm-16bit"),
    ("nestedfp-fp8", "nestedfp-16bit"),
)
"""Pairs whose throughputs are compared, the first over the second."""

GRID: list[Cell] = [
    *((128, 128, batch) for batch in (32, 1, 256, 128, 8, 512)),
    *((1024, 64, batch) for batch in (32, 1)),
    *((32, 512, batch) for batch in (32, 256)),
    *((1024, 64, batch) for batch in (128, 8)),
    *((32, 512, batch) for batch in (128, 1, 8)),
    *((1024, 64, batch) for batch in (256,)),
    *((32, 512, batch) for batch in (512,)),
    (1024, 64, 512),
]
"""What tells most for its time first: with three passes and four contenders on an H100 with
Llama-3.1-8B the first eight cells take some three minutes, all of them a quarter of an hour."""

WARM_UP_TOKENS = 4
WARM_UP_BATCH = 32


def warm_up_cell(cell: Cell) -> Cell:
    """A short pass of the cell's kind: its prompts, few requests, few tokens. The engines have compiled and
    run every kernel before they are ready; what is left is the allocator's and the host's first time."""
    input_len, output_len, batch = cell
    return input_len, min(output_len, WARM_UP_TOKENS), min(batch, WARM_UP_BATCH)


def parse_cells(text: str) -> list[Cell]:
    try:
        cells = [tuple(int(part) for part in cell.split("/")) for cell in text.split(",")]
        return [(i, o, b) for i, o, b in cells]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected in/out/batch such as 128/128/32") from error


def parse_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected sizes such as 1,8,32") from error
