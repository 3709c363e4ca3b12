"""Both products on a GPU: the public ones, which take Hopper's kernels on an H100, and the portable ones."""

import pytest
import torch
from torch import Tensor

from nestedfp.format import split
from nestedfp.kernels import reference
from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.layout import KOrder, store
from nestedfp.weight import Exactness, NestedWeight, nest

from .cases import (
    DTYPES,
    GuardedEmpty,
    poison_freed_memory,
    products,
    relative_error,
    truth,
    weight,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("backend", ["public", "portable"]),
]
modes = pytest.mark.parametrize("mode", list(Mode), ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])

BITS = torch.arange(-(1 << 15), 1 << 15).short()

SHAPES = [
    (1, 64, 64), (1, 4096, 4096), (2, 6144, 4096), (3, 77, 70), (7, 129, 80), (8, 5120, 4096),
    (16, 1000, 1024), (17, 333, 192), (31, 4100, 640), (33, 4096, 14336), (64, 6144, 4096),
    (65, 520, 2112), (100, 7, 4096), (128, 4096, 4096), (129, 1, 128), (200, 6144, 5120),
    (256, 28672, 512), (257, 640, 1000), (511, 513, 576), (512, 4096, 4096), (777, 3000, 333),
    (1024, 2048, 1024), (1025, 1040, 1), (2049, 1536, 704),
]  # fmt: skip


@dtypes
@modes
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_error_is_no_larger_than_the_librarys(
    M: int, N: int, K: int, mode: Mode, dtype: torch.dtype, backend: str
) -> None:
    """Against float64, 16-bit mode at most 1.05 times torch.mm's own error.

    FP8 mode is compared with the error of its exact product rounded to the output: sums of E4M3 products
    lose a little more in the tensor cores, which a bar of its own bounds.
    """
    w, nested = weight(N, K, dtype)
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    exact = truth(mode, x, nested)
    y = products(backend, mode)(x, nested)
    assert y.shape == (M, N)
    assert y.dtype == dtype
    rounded = relative_error(exact.to(dtype), exact)
    bar = 1.05 * max(relative_error(torch.mm(x, w.T), exact), rounded) + 1e-7
    if mode is Mode.FP8:
        bar = 1.05 * rounded + 1.5e-3 * (K / 4096) ** 0.5 + 2e-4
    assert relative_error(y, exact) <= bar


@dtypes
@modes
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 4096, 4096), (64, 6144, 4096), (300, 1000, 1088), (1000, 520, 80)]
)
def test_two_runs_are_equal_and_no_output_is_left_unwritten(
    M: int, N: int, K: int, mode: Mode, dtype: torch.dtype, backend: str
) -> None:
    _, nested = weight(N, K, dtype)
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    linear = products(backend, mode)
    first = linear(x, nested).clone()
    assert first.isfinite().all()
    for _ in range(5):
        poison_freed_memory(M * N, dtype)
        assert torch.equal(first, linear(x, nested))


@modes
@pytest.mark.parametrize(("M", "N"), [(1, 72), (5, 77), (70, 264), (130, 129), (300, 1000), (513, 96)])
def test_nothing_is_written_outside_the_output(
    M: int, N: int, mode: Mode, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, nested = weight(N, 320, torch.float16)
    x = torch.randn(M, 320, device="cuda", dtype=torch.float16)
    linear = products(backend, mode)
    expected = linear(x, nested)
    guarded = GuardedEmpty(torch.empty)
    monkeypatch.setattr(torch, "empty", guarded)
    y = linear(x, nested)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    assert guarded.intact()


@modes
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 4096, 4096), (64, 5120, 14336), (256, 5120, 14336), (1024, 5120, 4096), (600, 6144, 4096)],
)
def test_products_on_each_others_heels_are_right(M: int, N: int, K: int, mode: Mode, backend: str) -> None:
    """Launches overlap in a graph and share scratch: twenty in a row, ten times, give the bits of one."""
    _, nested = weight(N, K, torch.float16)
    x = torch.randn(M, K, device="cuda", dtype=torch.float16)
    linear = products(backend, mode)
    expected = linear(x, nested).clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        made = [linear(x, nested) for _ in range(20)]
    for _ in range(10):
        for y in made:
            y.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(y, expected) for y in made)


@dtypes
@modes
@pytest.mark.parametrize(("M", "K"), [(5, 192), (70, 80), (300, 4096)])
def test_strided_tokens_bias_and_leading_dimensions(
    M: int, K: int, mode: Mode, dtype: torch.dtype, backend: str
) -> None:
    _, nested = weight(264, K, dtype)
    bias = torch.randn(264, device="cuda", dtype=dtype)
    wide = torch.randn(M, 2 * K + 8, device="cuda", dtype=dtype)
    transposed = torch.randn(K, M, device="cuda", dtype=dtype).T
    linear = products(backend, mode)
    for x in (wide[:, :K], wide[:, 8 : K + 8], wide[:, 1 : K + 1], wide[:, : 2 * K : 2], transposed):
        exact = truth(mode, x, nested, bias)
        rounded = relative_error(exact.to(dtype), exact)
        assert relative_error(linear(x, nested, bias), exact) <= 1.2 * rounded + 2e-3
    if backend == "public":
        stacked = wide[None, :, :K].expand(2, -1, -1)
        flat = linear(stacked.reshape(-1, K), nested, bias)
        assert torch.equal(linear(stacked, nested, bias), flat.reshape(2, M, -1))


@dtypes
@modes
@pytest.mark.parametrize(("M", "N", "K"), [(1, 256, 512), (33, 4096, 4096), (300, 520, 1024)])
def test_graphs_replay_on_new_tokens(
    M: int, N: int, K: int, mode: Mode, dtype: torch.dtype, backend: str
) -> None:
    _, nested = weight(N, K, dtype)
    linear = products(backend, mode)
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    linear(x, nested)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, nested)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, linear(x, nested))


def held_values(dtype: torch.dtype) -> Tensor:
    """[rows, 128]: every finite value that a row of exponent zero holds exactly, 1.75 at each row's end.

    float16: all up to 1.75. bfloat16: zero, and magnitudes from 2^-17 to 1.75 (see `nestedfp.weight`).
    """
    magnitude = BITS.view(dtype).float().abs()
    least = 0.0 if dtype is torch.float16 else 2.0**-17
    held = BITS.view(dtype)[(magnitude <= 1.75) & ((magnitude >= least) | (magnitude == 0))].cuda()
    rows = torch.cat([held, held.new_ones(-len(held) % 127)]).reshape(-1, 127)
    return torch.cat([rows, rows.new_full((len(rows), 1), 1.75)], 1)


@dtypes
@pytest.mark.parametrize("order", list(KOrder))
@pytest.mark.parametrize("exponent", [0, -6, 4])
def test_every_value_of_an_exact_row_comes_back(
    exponent: int, order: KOrder, dtype: torch.dtype, backend: str
) -> None:
    """Tokens that form an identity matrix return the weights; a sum may turn minus zero into zero.

    With another exponent the values are those that the scaling leaves exact.
    """
    w = torch.ldexp(held_values(dtype).float(), torch.tensor(exponent, device="cuda")).to(dtype)
    nested = nest(w, order=order, require_exact=exponent == 0)
    assert (nested.row_exponent == exponent).all()
    kept = nested.merge()
    assert exponent != 0 or torch.equal(kept, w)
    y = products(backend, Mode.BITS16)(torch.eye(128, device="cuda", dtype=dtype), nested).T
    assert torch.equal(y, kept)
    assert torch.equal(y[kept != 0].view(torch.int16), kept[kept != 0].view(torch.int16))


@pytest.mark.parametrize("order", list(KOrder))
def test_raw_bytes_rebuild_bit_for_bit(order: KOrder, backend: str) -> None:
    """Every float16 number up to 1.8125 in magnitude, at a row exponent of zero, by an identity product."""
    values = BITS.view(torch.float16).cuda()
    values = values[values.abs() <= 1.8125]
    values = torch.cat([values, values.new_ones(-len(values) % 128)]).reshape(-1, 128)
    upper, lower = split(values)
    assert torch.equal(reference.rebuild_16bit(upper, lower).view(torch.int16), values.view(torch.int16))
    exponents = torch.zeros(len(values), dtype=torch.int8, device="cuda")
    unchecked = Exactness(len(values), 0, 0, 0, None, 0.0)
    nested = NestedWeight(
        store(upper, order), store(lower, order), exponents, torch.float16, order, unchecked
    )
    y = products(backend, Mode.BITS16)(torch.eye(128, device="cuda", dtype=torch.float16), nested).T
    assert torch.equal(y, values)
    assert torch.equal(y[values != 0].view(torch.int16), values[values != 0].view(torch.int16))


@modes
def test_tokens_without_a_finite_value_stay_apart(mode: Mode, backend: str) -> None:
    """NaN and infinity in one token reach its outputs alone; a token of zeros gives zeros."""
    _, nested = weight(200, 256, torch.float16)
    x = torch.randn(6, 256, device="cuda", dtype=torch.float16)
    x[1], x[2, 7], x[3, 9] = 0, float("nan"), float("inf")
    y = products(backend, mode)(x, nested)
    assert not y[1].any()
    assert y[2].isnan().all()
    assert not y[3].isfinite().any()
    assert y[[0, 4, 5]].isfinite().all()
