"""Scratch of the FP8 products: what a CUDA graph captures was allocated before it."""

import pytest
import torch

from nestedfp.kernels.dispatch import Backend, Mode, table
from nestedfp.kernels.hopper.cuda import gemm_fp8
from nestedfp.kernels.hopper.cuda.gemm_fp8 import Config
from nestedfp.kernels.hopper.fp8 import candidates

FIRST = 1 << 24
DEVICE = torch.device("cpu")


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> gemm_fp8._Scratch:
    monkeypatch.setattr(gemm_fp8, "workspace", lambda device: (torch.empty(0), torch.empty(0)))
    capturing(monkeypatch, False)
    return gemm_fp8._Scratch(DEVICE)


def capturing(monkeypatch: pytest.MonkeyPatch, now: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now)


def test_codes_grow_outside_a_capture_and_stay(scratch: gemm_fp8._Scratch) -> None:
    first = scratch.codes(1024, 4096)
    assert first.numel() == FIRST
    grown = scratch.codes(8192, 4096)
    assert grown.numel() >= 8192 * 4096
    assert scratch.codes(1024, 4096) is grown
    assert any(kept is first for kept in scratch._codes), "graphs may have captured it"


def test_a_capture_that_would_grow_them_is_refused(
    scratch: gemm_fp8._Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing(monkeypatch, True)
    assert scratch.codes(4096, 4096).numel() == FIRST
    with pytest.raises(RuntimeError, match=r"up to 8192 tokens and K = 4096 needs 33554432 .* run one of as"):
        scratch.codes(8192, 4096)
    assert len(scratch._codes) == 1


@pytest.mark.parametrize(("most", "K"), [(8192, 4096), (4000, 4096), (2048, 14336), (513, 32768)])
def test_after_the_largest_product_every_smaller_one_can_be_captured(
    scratch: gemm_fp8._Scratch, monkeypatch: pytest.MonkeyPatch, most: int, K: int
) -> None:
    # As many rows as the least of the tiles has.
    scratch.codes(-(-most // 64) * 64, K)
    capturing(monkeypatch, True)
    for M in (*range(1, most, 61), most):
        for height in {-(-M // tile) * tile for tile in (*tiles(), gemm_fp8._TALLEST)}:
            scratch.codes(height, K)


@pytest.mark.parametrize("M", [1, 64, 65, 256, 1024, 8192])
def test_every_cluster_divides_the_tallest(M: int) -> None:
    configs = [Config(**settings) for settings in candidates(M, 5120, 4096, most=1000)]
    for tokens in (*tiles(), *(config.tokens * config.cluster_tokens for config in configs)):
        assert gemm_fp8._TALLEST % tokens == 0


def tiles() -> set[int]:
    """Tokens of the clusters that the table holds."""
    rows = [row for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.FP8]
    configs = [Config(**row.config) for row in rows]
    return {config.tokens * config.cluster_tokens for config in configs}
