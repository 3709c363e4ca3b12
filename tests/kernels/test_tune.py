"""What the tuner keeps, on times that are given instead of measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nestedfp.kernels import contest, tune
from nestedfp.kernels.contest import Operands
from nestedfp.kernels.dispatch import Backend, Config, Mode
from nestedfp.kernels.timing import Contender

CONFIGS: list[Config] = [{"tokens": 16}, {"tokens": 32}, {"tokens": 64}]


def contender(name: str) -> Contender:
    return cast(Contender, name)


def test_it_goes_on_with_those_near_the_best() -> None:
    contenders = {name: contender(name) for name in "abcdef"}
    times = {"a": [10.0, 19.0], "b": [10.9], "c": [25.0, 9.8], "d": [10.5], "e": [30.0], "f": [12.0]}
    assert list(tune._nearest(contenders, times, 1.08)) == ["c", "a", "d"]
    many = {str(i): contender("a") for i in range(40)}
    assert list(tune._nearest(many, {name: [100.0 + int(name)] for name in many}, 1.5)) == list(many)[:12]


class Timed(float):
    """A contender that is known by its microseconds."""

    def __call__(self, _: int) -> None: ...


Times = tuple[float, float, float]
"""Microseconds of each of CONFIGS."""


def kept(monkeypatch: pytest.MonkeyPatch, served: Times, alone: Times | None) -> tuple[Config, float] | None:
    """What `fastest` keeps; without `alone` products are served as they are alone."""

    def measure(contenders: Mapping[str, Any], *_: Any, passes: int, **__: Any) -> dict[str, list[float]]:
        return {name: [us] * passes for name, us in contenders.items()}

    def product(us: Times) -> tune.Product:
        return lambda config: Timed(us[CONFIGS.index(config)])

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(contest, "error", lambda *_: 0.0)
    operands = cast(Operands, SimpleNamespace(sets=1, dtype="float16"))
    first = product(served)
    return tune.fastest(
        first, first if alone is None else product(alone), Mode.BITS16, CONFIGS, operands, 8, passes=3
    )


def test_time_alone_decides_between_those_that_serve_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    # The third is the fastest alone, and too slow where it serves.
    assert kept(monkeypatch, (20.0, 20.1, 21.0), (19.0, 18.0, 10.0)) == ({"tokens": 32}, 20.1)
    assert kept(monkeypatch, (20.0, 20.5, 20.3), (19.0, 10.0, 10.0)) == ({"tokens": 16}, 20.0)


def test_without_a_small_kernel_the_fastest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, (20.1, 20.0, 30.0), None) == ({"tokens": 32}, 20.0)


class Weights:
    """What a chain asks of operands, with names for planes."""

    def __init__(self, name: str, sets: int, K: int) -> None:
        self.sets, self._name = sets, name
        self._tokens = [torch.full((4, K), float(i)) for i in range(sets)]

    def x(self, i: int, M: int) -> torch.Tensor:
        return self._tokens[i][:M]

    def nested(self, i: int) -> Any:
        planes = {"upper": f"{self._name} upper {i}", "lower": f"{self._name} lower {i}"}
        return SimpleNamespace(**planes, row_exponent=i, order="order")


Call = tuple[str, Any, tuple[Any, ...], Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Who was called, with which tokens and operands, and what it was to ask for."""
    log: list[Call] = []

    def gated(tokens: torch.Tensor, *operands: Any, ahead: Any, gated: bool, order: str) -> torch.Tensor:
        assert gated
        log.append(("gated", tokens.tolist(), operands, ahead))
        return tokens + 0.5

    monkeypatch.setattr(tune, "copy_tokens", lambda source, to: to.copy_(source))
    monkeypatch.setattr(tune, "linear_16bit", gated)
    monkeypatch.setattr(tune, "linear_fp8", gated)
    return log


def backend(log: list[Call]) -> ModuleType:
    def linear(tokens: torch.Tensor, *operands: Any, **options: Any) -> None:
        log.append(("product", tokens.tolist(), operands, options.get("ahead")))

    return cast(ModuleType, SimpleNamespace(linear_16bit=linear, linear_fp8=linear))


def test_products_in_a_chain_copy_their_tokens_and_ask_for_the_next_weights(calls: list[Call]) -> None:
    operands = cast(Operands, Weights("w", 2, 8))
    tune._chained(backend(calls), Mode.BITS16, operands, 2, None)({})(1)
    tune._products(backend(calls), Mode.FP8, operands, lambda i: operands.x(i, 2))({})(1)
    rows = [[1.0] * 8] * 2
    assert calls == [
        ("product", rows, ("w upper 1", "w lower 1", 1), ("w upper 0", "w lower 0")),
        ("product", rows, ("w upper 1", 1), None),
    ]
    assert tune._copied_tokens(operands, 2)(1).data_ptr() != operands.x(1, 2).data_ptr()


def test_a_down_layer_follows_the_gated_product_of_its_mlp(calls: list[Call]) -> None:
    down, gate_up = cast(Operands, Weights("down", 3, 8)), cast(Operands, Weights("gate_up", 2, 4))
    tune._chained(backend(calls), Mode.FP8, down, 1, gate_up)({})(2)
    assert calls == [
        ("gated", [[0.0] * 4], ("gate_up upper 0", 0), ("down upper 2",)),
        ("product", [[0.5] * 4], ("down upper 2", 2), ("gate_up upper 1",)),
    ]


def test_a_device_has_a_table_of_its_own_unless_its_architectures_is_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_the_architecture = Path(tune.__file__).parent / "tables" / "hopper-sm90.json"
    tuned_on = json.loads(of_the_architecture.read_text())["header"]["device"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: tuned_on)
    assert tune.default_path(Backend.HOPPER) == of_the_architecture
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert tune.default_path(Backend.HOPPER).name == "hopper-sm90-nvidia-h200.json"
    assert tune.default_path(Backend.PORTABLE).name == "portable-sm90.json"
