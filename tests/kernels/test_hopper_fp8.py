"""The FP8 product on a Hopper GPU against float64 on its own quantised operands."""

import pytest
import torch
from torch import Tensor

from nestedfp.kernels import reference
from nestedfp.kernels.layout import KOrder, to_order

pytestmark = pytest.mark.gpu

# Half an ulp of the output dtype, as a relative error in norm, and room for float32 accumulation.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 3e-3}
GUARD = 1024


def operands(M: int, N: int, K: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, ...]:
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    upper = torch.randint(0, 256, (N, K), device="cuda", dtype=torch.uint8)
    upper[(upper & 0x7F) == 0x7F] = 0x40
    row_exponent = torch.randint(-9, 5, (N,), device="cuda", dtype=torch.int8)
    return x, upper, row_exponent, torch.randn(N, device="cuda", dtype=dtype) if bias else None


def expected(x: Tensor, upper: Tensor, row_exponent: Tensor, bias: Tensor | None, order: KOrder) -> Tensor:
    return reference.linear_fp8(x, upper, row_exponent, bias, order=order, accumulate=torch.float64)


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "N", "K", "order"),
    [
        (1, 64, 64, KOrder.HOPPER),
        (3, 77, 80, KOrder.NATURAL),
        (17, 4096, 4096, KOrder.HOPPER),
        (64, 264, 1040, KOrder.NATURAL),
        (100, 1000, 512, KOrder.HOPPER),
        (257, 520, 2048, KOrder.HOPPER),
        (1000, 3072, 1024, KOrder.HOPPER),
    ],
)
def test_product(M: int, N: int, K: int, order: KOrder, dtype: torch.dtype) -> None:
    from nestedfp.kernels import linear_fp8

    x, upper, row_exponent, bias = operands(M, N, K, dtype, bias=M % 2 == 1)
    y = linear_fp8(x, upper, row_exponent, bias, order=order)
    assert y.dtype == dtype
    assert error(y, expected(x, upper, row_exponent, bias, order)) < TOLERANCE[dtype]


@pytest.mark.parametrize("M", [1, 9, 40, 128, 300, 1025])
def test_every_candidate(M: int) -> None:
    from nestedfp.kernels.hopper.fp8 import candidates, linear_fp8

    N, K = 648, 1984
    x, upper, row_exponent, bias = operands(M, N, K, torch.float16)
    truth = expected(x, upper, row_exponent, bias, KOrder.HOPPER)
    for config in candidates(M, N, K):
        y = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
        assert error(y, truth) < TOLERANCE[torch.float16], config
        again = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
        assert torch.equal(y, again), config


@pytest.mark.parametrize("order", list(KOrder))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("M", "K"), [(1, 64), (5, 4096), (300, 5120), (3, 32768)])
def test_quantizer_equals_reference(M: int, K: int, dtype: torch.dtype, order: KOrder) -> None:
    from nestedfp.kernels.hopper.quantize import quantize

    x = torch.randn(M, K + 64, device="cuda", dtype=dtype)
    x *= torch.logspace(-6, 4, M, device="cuda", dtype=dtype)[:, None]
    x = x[:, :K]
    codes = torch.full((M, K), 0.5, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.full((M,), -1.0, device="cuda")
    quantize(x, codes, scale, order)
    want, want_scale = reference.quantize(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), to_order(want.view(torch.uint8), order))


def test_rows_without_a_scale() -> None:
    from nestedfp.kernels import linear_fp8

    x, upper, row_exponent, bias = operands(4, 128, 256, torch.float16)
    x[1] = 0
    x[2, 7] = float("nan")
    x[3, 9] = float("inf")
    y = linear_fp8(x, upper, row_exponent, bias)
    assert torch.equal(y[1], bias)
    assert y[0].isfinite().all()
    assert y[2:].isnan().all()


@pytest.mark.parametrize(("M", "N"), [(5, 72), (130, 264), (70, 77)])
def test_writes_all_of_the_output_and_nothing_else(M: int, N: int) -> None:
    from nestedfp.kernels.hopper.cuda.gemm_fp8 import product
    from nestedfp.kernels.hopper.fp8 import fused_candidates
    from nestedfp.kernels.hopper.gemm_fp8 import Config, gemm_fp8
    from nestedfp.kernels.hopper.quantize import quantize

    x, upper, row_exponent, bias = operands(M, N, 192, torch.float16)
    codes = torch.empty((M, 192), device="cuda", dtype=torch.float8_e4m3fn)
    scale = torch.empty(M, device="cuda")
    quantize(x, codes, scale, KOrder.HOPPER)
    for config in [Config(16, 32, warps=4), Config(64, 64, warps=4), *fused_candidates(M, N, 192)]:
        guarded = torch.full((GUARD + M * N + GUARD,), float("nan"), device="cuda", dtype=torch.float16)
        y = guarded[GUARD : GUARD + M * N].view(M, N)
        if isinstance(config, Config):
            gemm_fp8(codes, scale, upper, row_exponent, bias, y, config)
        else:
            product(x, upper, row_exponent, bias, y, KOrder.HOPPER, config)
        assert y.isfinite().all(), config
        assert guarded[:GUARD].isnan().all(), config
        assert guarded[GUARD + M * N :].isnan().all(), config


# Token blocks quantised in the background, K split over several CTAs, clusters that hang over the edges.
@pytest.mark.parametrize(
    ("config", "M", "N", "K"),
    [
        ({"rows": 256, "cluster_tokens": 2, "group": 1}, 3000, 8200, 1024),
        ({"rows": 192, "blocks": 2, "cluster_rows": 2, "group": 1}, 2100, 6200, 640),
        ({"rows": 256, "cluster_tokens": 2, "split": 3}, 200, 5120, 8192),
        ({"rows": 64, "warpgroups": 1, "chunks": 2, "split": 2, "cluster_rows": 2}, 33, 2000, 8256),
        ({"rows": 128, "promote": 1}, 300, 1000, 4096),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_launch(config: dict[str, int], M: int, N: int, K: int, dtype: torch.dtype) -> None:
    from nestedfp.kernels.hopper.fp8 import linear_fp8

    config = {"warpgroups": 2} | config
    x, upper, row_exponent, bias = operands(M, N, K, dtype)
    truth = expected(x, upper, row_exponent, bias, KOrder.HOPPER)
    first = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
    assert error(first, truth) < TOLERANCE[dtype] + 1.5e-3
    for _ in range(5):
        again = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
        assert torch.equal(first, again)


def test_graph_replays_on_new_inputs() -> None:
    from nestedfp.kernels import linear_fp8

    x, upper, row_exponent, bias = operands(33, 256, 512, torch.float16)
    linear_fp8(x, upper, row_exponent, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_fp8(x, upper, row_exponent, bias)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, linear_fp8(x, upper, row_exponent, bias))
