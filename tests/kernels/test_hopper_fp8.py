"""The FP8 product on a Hopper GPU against float64 on its own quantised operands: see `fp8_error`."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from nestedfp.kernels.layout import PANEL, KOrder

from .fp8_error import assert_product

pytestmark = pytest.mark.gpu

GUARD = 1024


def operands(M: int, N: int, K: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, ...]:
    x = torch.randn(M, K, device="cuda", dtype=dtype)
    upper = torch.randint(0, 256, (N, K), device="cuda", dtype=torch.uint8)
    upper[(upper & 0x7F) == 0x7F] = 0x40
    row_exponent = torch.randint(-9, 5, (N,), device="cuda", dtype=torch.int8)
    return x, upper, row_exponent, torch.randn(N, device="cuda", dtype=dtype) if bias else None


def summed(config: Mapping[str, int], K: int) -> int:
    """How much of K the tensor cores add up before float32 does."""
    return 128 * config["chunks"] if config.get("promote") else K


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("M", "N", "K", "order"),
    [
        (1, 64, 128, KOrder.HOPPER),
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
    assert_product(y, x, upper, row_exponent, bias, order)


@pytest.mark.parametrize("M", [1, 9, 40, 128, 300, 1025])
def test_every_candidate(M: int) -> None:
    from nestedfp.kernels.hopper.fp8 import candidates, linear_fp8

    N, K = 648, 2048
    x, upper, row_exponent, bias = operands(M, N, K, torch.float16)
    for config in candidates(M, N, K):
        y = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
        assert_product(y, x, upper, row_exponent, bias, KOrder.HOPPER, summed=summed(config, K), note=config)
        again = linear_fp8(x, upper, row_exponent, bias, order=KOrder.HOPPER, config=config)
        assert torch.equal(y, again), config


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


# The last two have more tiles than a device holds.
@pytest.mark.parametrize(("M", "N"), [(5, 72), (130, 264), (70, 77), (1030, 8216), (600, 8201)])
def test_writes_all_of_the_output_and_nothing_else(M: int, N: int) -> None:
    from nestedfp.kernels.hopper.cuda.gemm_fp8 import Config, product
    from nestedfp.kernels.hopper.fp8 import candidates

    x, upper, row_exponent, bias = operands(M, N, 256, torch.float16)
    for config in (Config(**settings) for settings in candidates(M, N, 256)):
        guarded = torch.full((GUARD + M * N + GUARD,), float("nan"), device="cuda", dtype=torch.float16)
        y = guarded[GUARD : GUARD + M * N].view(M, N)
        product(x, upper, row_exponent, bias, y, KOrder.HOPPER, config)
        assert y.isfinite().all(), config
        assert guarded[:GUARD].isnan().all(), config
        assert guarded[GUARD + M * N :].isnan().all(), config


# Tokens quantised in the background, parts of K after whole tiles, clusters that hang over the edges.
@pytest.mark.parametrize(
    ("config", "M", "N", "K"),
    [
        ({"rows": 256, "cluster_tokens": 2, "group": 1}, 3000, 8200, 1024),
        ({"rows": 128, "blocks": 2, "cluster_rows": 2, "group": 1}, 2100, 6200, 640),
        ({"rows": 256, "cluster_tokens": 2, "split": 3}, 200, 5120, 8192),
        ({"rows": 256, "cluster_tokens": 2, "split": 4}, 1100, 4360, 2064),
        ({"rows": 128, "blocks": 2, "split": 4, "cluster_tokens": 2}, 2500, 5120, 4112),
        ({"rows": 96, "blocks": 2, "split": 8}, 77, 1003, 8192),
        ({"rows": 160, "blocks": 2, "cluster_tokens": 2, "group": 2}, 1000, 5120, 4096),
        ({"rows": 160, "blocks": 2, "cluster_rows": 2, "split": 3}, 2100, 6152, 4096),
        ({"rows": 176, "blocks": 2}, 300, 1001, 2048),
        ({"rows": 192, "blocks": 2, "cluster_tokens": 2}, 1000, 6144, 4096),
        ({"rows": 192, "blocks": 2, "cluster_rows": 2, "group": 1}, 2100, 6152, 512),
        ({"rows": 64, "warpgroups": 1, "chunks": 2, "split": 2, "cluster_rows": 2}, 33, 2000, 8256),
        ({"rows": 128, "promote": 1}, 300, 1000, 4096),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_launch(config: dict[str, int], M: int, N: int, K: int, dtype: torch.dtype) -> None:
    from nestedfp.kernels.hopper.fp8 import linear_fp8

    config = {"warpgroups": 2, "chunks": 1} | config
    order = KOrder.HOPPER if K % PANEL == 0 else KOrder.NATURAL
    x, upper, row_exponent, bias = operands(M, N, K, dtype)
    first = linear_fp8(x, upper, row_exponent, bias, order=order, config=config)
    assert_product(first, x, upper, row_exponent, bias, order, summed=summed(config, K))
    for _ in range(5):
        again = linear_fp8(x, upper, row_exponent, bias, order=order, config=config)
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
