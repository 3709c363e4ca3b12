"""Gated products on a GPU: by configuration of Hopper's kernels, and the public ones."""

import pytest
import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.gated import TURN
from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.hopper.fp8 import linear_fp8
from nestedfp.kernels.hopper.linear_16bit import linear_16bit
from nestedfp.weight import NestedWeight

from .cases import DTYPES, GuardedEmpty, products, weight

pytestmark = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])

# Every way to end a tile: stored by threads or by the copy engine, in slices of 16 and 32 tokens, after sums
# were exchanged, after parts were gathered.
CONFIGS_16BIT = [
    gemm_16bit.Config(16, 4),
    gemm_16bit.Config(48, 1, ctas=2),
    gemm_16bit.Config(96, sliced_k=2, split=4, waves=1),
    gemm_16bit.Config(128, 2),
    gemm_16bit.Config(128, cluster_tokens=2, sliced_k=2, cluster_k=2),
    gemm_16bit.Config(176, 3, cluster_rows=2),
    gemm_16bit.Config(192, 3, split=4),
    gemm_16bit.Config(256, cluster_rows=2),
    gemm_16bit.Config(256, cluster_k=2, waves=1),
    gemm_16bit.Config(352),
]
# Slices of 16, 32 and 64 weight rows, thus lines of 8, 16 and 32 outputs.
CONFIGS_FP8 = [
    gemm_fp8.Config(48, 1, chunks=2, promote=1),
    gemm_fp8.Config(112, 1, promote=1),
    gemm_fp8.Config(96, 2, split=4),
    gemm_fp8.Config(128, 2, split=2),
    gemm_fp8.Config(192, 2, blocks=2, cluster_rows=2),
    gemm_fp8.Config(80, 2, deferred=1),
    gemm_fp8.Config(160, 2, deferred=1),
    gemm_fp8.Config(256, 2, cluster_tokens=2, deferred=1),
    gemm_fp8.Config(256, 2, cluster_tokens=2, split=4, deferred=1),
]


def assert_gated(y: Tensor, plain: Tensor) -> None:
    """y [M, N / 2] is silu(gate) * partner of the products `plain` [M, N], rounded once.

    Beside half a unit in the last place ex2 and rcp lose a few 2^-22, and the rounded argument of ex2 up to
    2^-17 of the output; of a gate below -87 the output is zero.
    """
    gate, partner = plain.double().unflatten(-1, (-1, 2, TURN)).unbind(-2)
    exact = (torch.nn.functional.silu(gate) * partner).flatten(-2)
    kind = torch.finfo(plain.dtype)
    bound = exact.abs() * (kind.eps / 2 + 2.0**-16) + kind.smallest_normal * kind.eps / 2
    bound += (partner.abs() * 1e-36).flatten(-2)
    assert y.shape == exact.shape
    assert y.dtype == plain.dtype
    overflows = exact.to(plain.dtype).isinf()
    assert torch.equal(y[overflows], exact[overflows].to(plain.dtype))
    assert ((y.double() - exact).abs()[~overflows] <= bound[~overflows]).all()


def tokens(M: int, K: int, dtype: torch.dtype) -> Tensor:
    """Of magnitudes that give gates from far below zero to far above."""
    return torch.ldexp(torch.randn(M, K, device="cuda"), torch.randint(-5, 2, (M, 1), device="cuda")).to(
        dtype
    )


@hopper
@dtypes
@pytest.mark.parametrize(("N", "K"), [(208, 256), (5120, 1280)])
@pytest.mark.parametrize("config", CONFIGS_16BIT, ids=repr)
def test_16bit(config: gemm_16bit.Config, N: int, K: int, dtype: torch.dtype) -> None:
    _, nested = weight(N, K, dtype)
    planes = (nested.upper, nested.lower, nested.row_exponent)
    bias = torch.randn(N, device="cuda", dtype=dtype)
    for M in (1, 17, 100, 300, 700, 2100):
        if config.tokens * (config.cluster_tokens - 1) >= M:
            continue
        x = tokens(M, K, dtype)
        plain = linear_16bit(x, *planes, bias, config=config.to_dict())
        assert_gated(linear_16bit(x, *planes, bias, config=config.to_dict(), gated=True), plain)


@hopper
@dtypes
@pytest.mark.parametrize(("N", "K"), [(208, 256), (5120, 1280), (5120, 256), (2560, 1280)])
@pytest.mark.parametrize("config", CONFIGS_FP8, ids=repr)
def test_fp8(config: gemm_fp8.Config, N: int, K: int, dtype: torch.dtype) -> None:
    """Among the tiles of 2,100 tokens are some whose outputs wait for fewer steps than they have shares (K =
    256), and some with parts of a tile behind them (N = 2560)."""
    _, nested = weight(N, K, dtype)
    codes = (nested.upper, nested.row_exponent)
    bias = torch.randn(N, device="cuda", dtype=dtype)
    for M in (1, 17, 100, 300, 700, 2100):
        if config.tokens * (config.cluster_tokens - 1) >= M:
            continue
        x = tokens(M, K, dtype)
        plain = linear_fp8(x, *codes, bias, order=nested.order, config=config.to_dict())
        y = linear_fp8(x, *codes, bias, order=nested.order, config=config.to_dict(), gated=True)
        assert_gated(y, plain)


@dtypes
@pytest.mark.parametrize("mode", list(Mode), ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(1, 28672, 512), (70, 96, 80), (300, 1040, 333), (513, 6144, 1024)]
)
def test_public_products(
    M: int, N: int, K: int, mode: Mode, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernels twice, so the products agree bit for bit; nothing is written outside y."""
    _, nested = weight(N, K, dtype)
    linear = products("public", mode)
    x = tokens(M, K, dtype)
    plain = linear(x, nested)
    guarded = GuardedEmpty(torch.empty)
    monkeypatch.setattr(torch, "empty", guarded)
    y = linear(x, nested, gated=True)
    torch.cuda.synchronize()
    assert guarded.intact()
    assert_gated(y, plain)


@hopper
@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_crooked_tokens_many_tokens_and_what_is_asked_ahead(mode: Mode) -> None:
    """Tokens off 16-byte boundaries take other kernels; more than 16,384 go through FP8 in pieces."""
    _, nested = weight(208, 256, torch.float16)
    linear = products("public", mode)
    wide = tokens(70, 520, torch.float16)
    crooked = wide[:, 1:257]
    assert_gated(linear(crooked, nested, gated=True), linear(crooked, nested))
    many = tokens(gemm_fp8.MOST_TOKENS + 300, 256, torch.float16)
    y = linear(many, nested, gated=True)
    assert_gated(y, linear(many, nested))
    ahead = (nested.upper,)
    assert torch.equal(
        linear(many[:70], nested, gated=True, ahead=ahead), linear(many[:70], nested, gated=True)
    )


@hopper
@pytest.mark.parametrize("mode", list(Mode), ids=str)
def test_gates_that_saturate(mode: Mode) -> None:
    """Gates of +-1e4, 0 and -80 give what float64 gives, NaN and infinities what torch gives; from -88 down
    zero, where bfloat16 has numbers that small."""
    gates = torch.tensor([1e4, -1e4, 0.0, -80.0, float("inf"), float("-inf"), float("nan"), -88.0])
    for dtype in DTYPES:
        nested = identity_pair(dtype)
        x = torch.zeros(8, 128, device="cuda", dtype=dtype)
        bias = torch.zeros(16, device="cuda", dtype=dtype)
        bias[:TURN] = gates.to("cuda", dtype)
        bias[TURN:] = 3.0
        y = products("public", mode)(x, nested, bias, gated=True)
        expected = (torch.nn.functional.silu(bias[:TURN].double()) * 3.0).to(dtype).expand(8, -1).clone()
        expected[:, -1] = 0.0
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=0.0, equal_nan=True)


def identity_pair(dtype: torch.dtype) -> NestedWeight:
    """A weight of sixteen rows, whose products with zeros are the bias alone."""
    return weight(2 * TURN, 128, dtype)[1]
