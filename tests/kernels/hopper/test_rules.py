"""The rules for products that no table has: a configuration that fits and covers, for any M, N and K."""

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.kernels.hopper.cuda import gemm_16bit, gemm_fp8
from nestedfp.kernels.hopper.fp8 import RULE as RULE_FP8
from nestedfp.kernels.hopper.linear_16bit import RULE as RULE_16BIT

from .plans import assert_covers_16bit, assert_covers_fp8

# A weight takes a search of its own; numbers of tokens choose among what it finds.
WEIGHTS = settings(max_examples=20, deadline=None)
TOKENS = st.lists(st.integers(1, 16384), min_size=20, max_size=40)
ROWS = st.integers(1, 200_000)


@WEIGHTS
@given(counts=TOKENS, N=ROWS, K=st.integers(1, 550).map(lambda panels: 128 * panels))
def test_16bit(counts: list[int], N: int, K: int) -> None:
    check(RULE_16BIT, gemm_16bit.SHARED_MEMORY, assert_covers_16bit, counts, N, K)


@WEIGHTS
@given(counts=TOKENS, N=ROWS, K=st.integers(1, 4400).map(lambda granules: 16 * granules))
def test_fp8(counts: list[int], N: int, K: int) -> None:
    check(RULE_FP8, gemm_fp8.SHARED_MEMORY, assert_covers_fp8, counts, N, K)


def check(
    rule: Any, shared_memory: int, assert_covers: Callable[..., None], counts: list[int], N: int, K: int
) -> None:
    for M in counts:
        config = rule.best(M, N, K)
        assert config in rule.all(M, N, K)
        assert config.shared_memory <= shared_memory // config.ctas - 1024
        assert_covers(config, M, N, K)
