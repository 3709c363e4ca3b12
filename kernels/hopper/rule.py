"""Configurations for products that no table has, by an estimate of their cycles."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Generic, TypeVar

from nestedfp.kernels.dispatch import token_grid

Kind = TypeVar("Kind")

# Of tokens, for which configurations are looked for; from there on tiles and waves are many, and all alike.
_LARGEST = 8192


class Rule(Generic[Kind]):
    """Chooses by `cycles(config, M, N, K)` among what `space(M, N, K)` gives for a few numbers of tokens."""

    def __init__(
        self,
        space: Callable[[int, int, int], Iterable[Kind]],
        cycles: Callable[[Kind, int, int, int], float],
    ) -> None:
        self._space, self._cycles = space, cycles
        self._fastest = lru_cache(maxsize=4096)(self._search)
        self.best = lru_cache(maxsize=1 << 14)(self._choose)
        """The configuration for M, N, K that is estimated to be fastest, of those for the next larger number
        of tokens at most."""

    def all(self, largest: int, N: int, K: int) -> list[Kind]:
        """Those that it chooses from for up to `largest` tokens of a weight: few enough to be compiled before
        they are needed."""
        return list(dict.fromkeys(self._fastest(M, N, K) for M in token_grid(min(largest, _LARGEST))))

    def _choose(self, M: int, N: int, K: int) -> Kind:
        return min(self.all(M, N, K), key=lambda config: self._cycles(config, M, N, K))

    def _search(self, M: int, N: int, K: int) -> Kind:
        return min(self._space(M, N, K), key=lambda config: self._cycles(config, M, N, K))
