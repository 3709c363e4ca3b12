"""The live load: who is sent when, what counts as met, and what is given up."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COUNTS = {"tokens": {"fp16": 0, "fp8": 0}, "steps": {"fp16": 0}, "bounded_steps": 0, "flips": 1}


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield importlib.import_module("live_engine")


class Core:
    """Makes one token of every request a step; those in `stuck` make none."""

    def __init__(self, stuck: tuple[str, ...] = ()) -> None:
        self.left: dict[str, int] = {}
        self.aborted: list[str] = []
        self._stuck = stuck

    def add_request(self, name: str, prompt: Any, params: Any, *, arrival_time: float) -> None:
        self.left[name] = params.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def abort_request(self, names: list[str]) -> None:
        self.aborted += [name for name in names if self.left.pop(name, None)]

    def step(self) -> list[SimpleNamespace]:
        made = []
        for name in [name for name in self.left if name not in self._stuck]:
            self.left[name] -= 1
            token = SimpleNamespace(token_ids=[7])
            done = self.left[name] == 0
            made.append(SimpleNamespace(request_id=name, outputs=[token], finished=done))
            if done:
                del self.left[name]
        return made


def engine(core: Core) -> SimpleNamespace:
    return SimpleNamespace(llm=SimpleNamespace(llm_engine=core), prompts=lambda length, batch: [[1] * length])


def test_requests_are_sent_when_they_are_due_and_served_to_the_end(module: ModuleType) -> None:
    served = module.serve(engine(Core()), [[0.0, 5, 3], [0.05, 5, 2], [0.1, 5, 1]])
    assert sorted((each.arrival, each.tokens) for each in served) == [(0.0, 3), (0.05, 2), (0.1, 1)]
    assert all(each.arrival <= each.first <= each.last for each in served)


def test_what_does_not_end_is_aborted(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.05)
    core = Core(stuck=("1",))
    served = module.serve(engine(core), [[0.0, 5, 3], [0.0, 5, 2]])
    assert [each.tokens for each in served] == [3]
    assert core.aborted == ["1"]


def test_a_request_that_was_not_served_has_not_met_the_slo(module: ModuleType) -> None:
    in_time = module.Served(arrival=1.0, first=1.5, last=1.5 + 9 * 0.03, tokens=10)
    slow, late = in_time._replace(last=1.5 + 9 * 0.04), in_time._replace(first=2.1, last=2.3)
    after = COUNTS | {
        "tokens": {"fp16": 30, "fp8": 10},
        "steps": {"fp16": 4},
        "flips": 3,
        "step_corrections": {},
    }
    found = module.figures([in_time, slow, late], 4, {"ttft_s": 1.0, "tpot_s": 0.033}, COUNTS, after)
    assert found["attainment"] == 0.25
    assert found["missed"] == {"ttft": 1, "tpot": 1, "both": 0}
    assert found["fp16_token_share"] == 0.75
    assert found["requests"] == {"sent": 4, "served": 3}
    assert (found["steps"], found["flips"]) == (4, 2)
