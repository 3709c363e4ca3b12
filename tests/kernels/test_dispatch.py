"""Dispatch: total over shapes, faithful to the table, and honest about what a kernel can address."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.kernels import dispatch
from nestedfp.kernels.dispatch import (
    Backend,
    Mode,
    Problem,
    TableRow,
    choose,
    holding,
    parse_table,
    table,
    token_grid,
)
from nestedfp.kernels.layout import KOrder
from nestedfp.kernels.shapes import SHAPES, TOKENS

HOPPER = (9, 0)
ROWS = [TableRow(Mode.FP8, "float16", M, 4096, 4096, 1.0, {"tokens": M}) for M in (8, 16, 128, 256)]


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
    ("M", "tokens"), [(1, 8), (8, 8), (9, 16), (17, None), (127, None), (128, 128), (129, None), (257, None)]
)
def test_few_tokens_take_the_next_larger_row_and_many_their_own_or_none(M: int, tokens: int | None) -> None:
    assert holding(ROWS, M) == (None if tokens is None else {"tokens": tokens})


def test_another_weight_than_the_table_s_is_left_to_the_kernel_s_rule() -> None:
    for N, K in ((4097, 4096), (4096, 4224), (37888, 3584)):
        for M in (1, 64, 1024):
            assert choose(Problem(Mode.BITS16, M, N, K, "float16", KOrder.HOPPER), HOPPER).config is None


@given(largest=st.integers(1, 1 << 17))
def test_a_grid_of_tokens_is_at_most_a_quarter_apart_and_reaches_the_largest(largest: int) -> None:
    grid = token_grid(largest)
    assert grid[-1] >= largest
    assert len(grid) == 1 or grid[-2] < largest
    assert all(after - before <= max(16, before / 4) for before, after in pairwise(grid))
    assert all(count % 16 == 0 for count in grid)


@pytest.mark.parametrize(
    ("problem", "capability", "backend"),
    [
        (Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.NATURAL), None, Backend.CPU),
        (Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.NATURAL), (8, 0), Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 72, "float16", KOrder.NATURAL), HOPPER, Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 80, "float16", KOrder.NATURAL), HOPPER, Backend.HOPPER),
        (Problem(Mode.BITS16, 1, 64, 64, "float16", KOrder.NATURAL), HOPPER, Backend.PORTABLE),
        (Problem(Mode.FP8, 1, 64, 128, "float16", KOrder.HOPPER, tma=False), HOPPER, Backend.PORTABLE),
    ],
)
def test_backend(problem: Problem, capability: tuple[int, int] | None, backend: Backend) -> None:
    assert choose(problem, capability).backend is backend


@given(
    M=st.integers(1, 16384),
    N=st.integers(1, 200_000),
    K=st.integers(1, 70_000),
    mode=st.sampled_from(list(Mode)),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    tma=st.booleans(),
    capability=st.sampled_from([None, (8, 0), (8, 9), HOPPER, (10, 0), (12, 0)]),
)
def test_any_shape_on_any_device_has_a_kernel_that_can_address_it(
    M: int, N: int, K: int, mode: Mode, dtype: str, tma: bool, capability: tuple[int, int] | None
) -> None:
    for order in KOrder:
        if order is KOrder.HOPPER and K % 128:
            continue
        problem = Problem(mode, M, N, K, dtype, order, tma)
        choice = choose(problem, capability)
        assert choice == choose(problem, capability)
        if choice.backend is Backend.HOPPER:
            assert capability == HOPPER
            assert tma
            assert K % 16 == 0
            assert mode is Mode.FP8 or order is KOrder.HOPPER
        else:
            assert choice.backend is (Backend.CPU if capability is None else Backend.PORTABLE)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_benchmarks_shapes_run_on_hopper(mode: Mode, dtype: str) -> None:
    for shape in SHAPES:
        for M in TOKENS:
            problem = Problem(mode, M, shape.N, shape.K, dtype, KOrder.HOPPER)
            assert choose(problem, HOPPER).backend is Backend.HOPPER


def test_a_type_without_rows_takes_those_of_the_other() -> None:
    rows = [row for row in table(Backend.HOPPER, HOPPER) if row.mode is Mode.FP8]
    if {row.dtype for row in rows} != {"float16"}:
        pytest.skip("the table has rows of both types")
    for row in rows:
        problem = Problem(Mode.FP8, row.M, row.N, row.K, "bfloat16", KOrder.HOPPER)
        assert choose(problem, HOPPER).config == row.config


def test_a_backend_without_a_table_leaves_the_choice_to_its_kernel() -> None:
    assert choose(Problem(Mode.FP8, 1, 64, 64, "float16", KOrder.NATURAL), (8, 0)).config is None


def test_a_devices_own_rows_go_before_those_of_its_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, tokens: dict[int, int]) -> None:
        row = {"mode": "fp8", "dtype": "float16", "N": 256, "K": 256, "us": 1.0}
        rows = [{**row, "M": M, "config": {"tokens": value}} for M, value in tokens.items()]
        (tmp_path / name).write_text(json.dumps({"header": {}, "rows": rows}))

    def chosen(M: int, device: str) -> int:
        config = choose(Problem(Mode.FP8, M, 256, 256, "float16", KOrder.HOPPER), HOPPER, device).config
        assert config is not None
        return config["tokens"]

    write("hopper-sm90.json", {128: 1, 256: 2})
    write("hopper-sm90-nvidia-h200.json", {256: 3})
    monkeypatch.setattr(dispatch, "TABLES", tmp_path)
    for cached in (dispatch.table, dispatch.rows_of):
        cached.cache_clear()
    try:
        assert [chosen(M, "NVIDIA H200") for M in (128, 256)] == [1, 3]
        assert [chosen(M, "NVIDIA H100 80GB HBM3") for M in (128, 256)] == [1, 2]
        assert [chosen(M, "") for M in (128, 256)] == [1, 2]
    finally:
        for cached in (dispatch.table, dispatch.rows_of):
            cached.cache_clear()


def test_a_table_of_an_unknown_mode_is_an_error() -> None:
    row = {"mode": "int4", "dtype": "float16", "M": 1, "N": 1, "K": 1, "us": 1.0, "config": {}}
    with pytest.raises(ValueError, match="int4"):
        parse_table({"rows": [row]})
