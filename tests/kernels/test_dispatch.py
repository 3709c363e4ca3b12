"""Dispatch: total over shapes, faithful to the table, and honest about what a kernel can address."""

import pytest

from nestedfp.kernels.dispatch import Backend, Mode, Problem, TableRow, choose, nearest, table
from nestedfp.kernels.layout import KOrder

HOPPER = (9, 0)
ROWS = [
    TableRow(Mode.FP8, "float16", M, N, 4096, 1.0, {"tokens": M}) for M in (16, 128) for N in (4096, 28672)
]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(("N", "K"), [(1, 64), (77, 128), (5000, 4096), (128256, 8192)])
def test_every_number_of_tokens_has_a_kernel(mode: Mode, N: int, K: int) -> None:
    for M in range(1, 16385):
        assert choose(Problem(mode, M, N, K, "float16", KOrder.HOPPER), HOPPER).backend is Backend.HOPPER


def test_tabled_shapes_get_their_own_configuration() -> None:
    for row in table(Backend.HOPPER, HOPPER):
        problem = Problem(row.mode, row.M, row.N, row.K, row.dtype, KOrder.HOPPER)
        assert choose(problem, HOPPER).config == row.config


@pytest.mark.parametrize(
    ("M", "N", "tokens", "rows"), [(1, 4000, 16, 4096), (17, 4096, 128, 4096), (9999, 40000, 128, 28672)]
)
def test_nearest_shape(M: int, N: int, tokens: int, rows: int) -> None:
    row = nearest(ROWS, M, N, 4096)
    assert (tokens, rows) == (row.M, row.N)


@pytest.mark.parametrize(
    ("problem", "capability", "backend"),
    [
        (Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.NATURAL), None, Backend.CPU),
        (Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.NATURAL), (8, 0), Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 72, "float16", KOrder.NATURAL), HOPPER, Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 80, "float16", KOrder.NATURAL), HOPPER, Backend.HOPPER),
        (Problem(Mode.BITS16, 1, 64, 64, "float16", KOrder.NATURAL), HOPPER, Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.HOPPER, tma=False), HOPPER, Backend.PORTABLE),
    ],
)
def test_backend(problem: Problem, capability: tuple[int, int] | None, backend: Backend) -> None:
    assert choose(problem, capability).backend is backend
