"""What only Hopper's products do: warpgroups and CTAs that share K, and asking for what comes next."""

import pytest
import torch
from torch import Tensor

from nestedfp.kernels.dispatch import Mode
from nestedfp.kernels.hopper.cuda import gemm_16bit
from nestedfp.kernels.hopper.cuda.gemm_16bit import Config
from nestedfp.kernels.hopper.linear_16bit import linear_16bit
from nestedfp.weight import NestedWeight

from .cases import DTYPES, products, relative_error, truth, weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

SHARED_K = [
    Config(64, sliced_k=2),
    Config(96, sliced_k=2, split=4, waves=1),
    Config(128, sliced_k=2, split=2),
    Config(128, cluster_tokens=2, sliced_k=2),
    Config(256, cluster_rows=2, sliced_k=2, split=3),
    Config(16, 1, cluster_k=2),
    Config(16, 1, ctas=2, cluster_k=2),
    Config(64, 1, ctas=2, cluster_k=2),
    Config(64, sliced_k=2, cluster_k=2),
    Config(96, 4, cluster_k=2, waves=1),
    Config(176, 3, cluster_k=2),
    Config(256, cluster_k=2),
    Config(256, cluster_k=2, waves=1),
    Config(64, cluster_tokens=2, sliced_k=2, cluster_k=2),
    Config(128, cluster_tokens=2, cluster_k=2),
    Config(128, 3, cluster_tokens=2, cluster_k=2, waves=1),
    Config(256, cluster_rows=2, cluster_k=2),
    Config(256, cluster_rows=2, cluster_k=2, waves=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("N", "K"), [(200, 128), (4096, 256), (1000, 4096), (5120, 1280)])
@pytest.mark.parametrize("config", SHARED_K, ids=repr)
def test_warpgroups_and_ctas_that_share_k(config: Config, N: int, K: int, dtype: torch.dtype) -> None:
    w, nested = weight(N, K, dtype)
    for M in (1, 17, 64, 100, 255, 300, 513):
        if config.tokens * (config.cluster_tokens - 1) >= M:
            continue
        x = torch.randn(M, K, device="cuda", dtype=dtype)
        exact = truth(Mode.BITS16, x, nested)
        planes = (nested.upper, nested.lower, nested.row_exponent)
        y = linear_16bit(x, *planes, config=config.to_dict())
        bar = max(relative_error(torch.mm(x, w.T), exact), relative_error(exact.to(dtype), exact))
        assert relative_error(y, exact) <= 1.05 * bar + 1e-7
        assert torch.equal(y, linear_16bit(x, *planes, config=config.to_dict()))


# Tiles that the copy engine stores, in more slices than there are places for, some of two products a step.
SENT = [
    Config(96, 4),
    Config(176, 3, cluster_rows=2),
    Config(192, 3, group=2),
    Config(224, cluster_tokens=2),
    Config(256, cluster_tokens=2, cluster_rows=2),
    Config(256, cluster_rows=2, split=4),
    Config(256, cluster_k=2, waves=1),
    Config(256, sliced_k=2),
    Config(272, cluster_rows=2),
    Config(304, split=2, waves=1),
    Config(352),
    Config(352, cluster_rows=2),
    Config(352, cluster_k=2),
]


def product(x: Tensor, w: NestedWeight, y: Tensor, config: Config) -> None:
    gemm_16bit.product(x, w.upper, w.lower, w.row_exponent, None, y, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("N", "K"), [(200, 256), (1001, 128), (8192, 384), (5120, 1280)])
@pytest.mark.parametrize("config", SENT, ids=repr)
def test_many_tokens(config: Config, N: int, K: int, dtype: torch.dtype) -> None:
    """Right, the same twice, and nothing stored around y, whose rows begin on 16-byte boundaries or not."""
    w, nested = weight(N, K, dtype)
    for M in (300, 512, 700, 2100):
        x = torch.randn(M, K, device="cuda", dtype=dtype)
        exact = truth(Mode.BITS16, x, nested)
        bar = max(relative_error(torch.mm(x, w.T), exact), relative_error(exact.to(dtype), exact))
        margin = 8 * N
        outputs = []
        for poison in (float("nan"), 1e4):
            around = torch.full((M * N + 2 * margin,), poison, device="cuda", dtype=dtype)
            y = around[margin:-margin].view(M, N)
            product(x, nested, y, config)
            outputs.append(y.clone())
            untouched = torch.full_like(around[:margin], poison)
            for edge in (around[:margin], around[-margin:]):
                assert torch.equal(edge.view(torch.int16), untouched.view(torch.int16))
        assert relative_error(outputs[0], exact) <= 1.05 * bar + 1e-7
        assert torch.equal(*outputs)


def test_products_that_share_scratch_run_on_each_others_heels() -> None:
    """Parts of K, whose sums lie where those of the product before lay."""
    configs = [
        Config(256, split=3),
        Config(128, split=2, waves=1),
        Config(192, 3, split=4),
        Config(256, cluster_rows=2, split=2, waves=1),
        Config(64, 1, ctas=2, split=8),
    ]
    sizes = [(2048, 4096, 1024), (800, 5120, 640), (3000, 1000, 2048), (4096, 264, 512), (1100, 6144, 384)]
    runs = []
    for (M, N, K), config in zip(sizes, configs, strict=True):
        _, nested = weight(N, K, torch.float16)
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        y = torch.empty(M, N, device="cuda", dtype=torch.float16)
        product(x, nested, y, config)
        runs.append((x, nested, y, config, y.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x, nested, y, config, _ in runs:
            product(x, nested, y, config)
    for _ in range(300):
        graph.replay()
    torch.cuda.synchronize()
    for x, nested, y, _, expected in runs:
        exact = truth(Mode.BITS16, x, nested)
        assert relative_error(y, exact) <= 1.05 * relative_error(exact.to(torch.float16), exact) + 1e-7
        assert torch.equal(y, expected)


@pytest.mark.parametrize("mode", list(Mode), ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 4096), (70, 264, 256), (300, 6144, 4096)])
def test_what_the_next_product_reads_changes_no_bit(M: int, N: int, K: int, mode: Mode) -> None:
    """One plane or two, shorter than what is asked for at most, or longer."""
    _, nested = weight(N, K, torch.float16)
    _, following = weight(72, 128, torch.float16)
    x = torch.randn(M, K, device="cuda", dtype=torch.float16)
    linear = products("public", mode)
    expected = linear(x, nested).clone()
    for ahead in ((following.upper,), (following.upper, following.lower), (nested.upper, nested.lower)):
        assert torch.equal(linear(x, nested, ahead=ahead), expected)
