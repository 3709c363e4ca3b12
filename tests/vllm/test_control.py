"""EngineControl against the real command handler, with a scheduler that is only its precision parts."""

import re
from typing import Any

import pytest

from nestedfp.vllm.accounting import RequestTokens, StepCounts
from nestedfp.vllm.control import UTILITY, EngineControl
from nestedfp.vllm.core import nestedfp_control
from nestedfp.vllm.selection import PlanSelection
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.status import EngineStatus
from nestedfp.vllm.step import StepReport, StepTag


class Scheduler:
    def __init__(self) -> None:
        self.selection = PlanSelection(Settings())
        self.request_tokens = RequestTokens()
        self.counts = StepCounts(["fp16", "fp8"])

    def precision_status(self, facts: dict[str, Any]) -> EngineStatus:
        return EngineStatus(
            mode=self.selection.mode,
            epoch=self.selection.epoch,
            current="fp16",
            steps={},
            tokens={},
            flips=0,
            last_flip_seconds=None,
            last_flip_reason=None,
            mixed_steps=self.counts.mixed_steps,
            running=0,
            waiting=0,
            waiting_prompt_tokens=0,
            oldest_waiting_s=0.0,
            kv_usage=0.0,
            step_time_s={},
            strict_running=0,
            at=1.0,
            **facts,
        )


class Core:
    """vLLM's `EngineCore` and the client in front of it, in one."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.rpcs = 0
        self.nested, self.loads = 4, 4
        self.inexact_rows, self.mixed = [0], [0]
        """By rank."""

    def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        self.rpcs += 1
        if method == "checked_steps":
            return [{"mixed": mixed} for mixed in self.mixed]
        assert method == "precision_facts"
        layers = {"nested": self.nested, "plain": 4 - self.nested}
        facts = {"layers": layers, "plain_reasons": {}, "loads": self.loads}
        return [{**facts, "inexact_rows": rows} for rows in self.inexact_rows]

    async def call_utility_async(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        assert method == UTILITY
        return nestedfp_control(self, request)


class Engine:
    def __init__(self, scheduler: Any) -> None:
        self.engine_core = Core(scheduler)


async def test_a_target_and_the_status_travel_through() -> None:
    engine = Engine(Scheduler())
    control = EngineControl(engine)
    await control.set_target("fp8", epoch=7, reason="burst")
    status = await control.status()
    assert (status.mode, status.epoch, status.layers) == ("fp8", 7, {"nested": 4, "plain": 0})
    await control.status()
    assert engine.engine_core.rpcs == 1


async def test_facts_of_the_worker_are_asked_anew_after_a_reload_of_weights() -> None:
    engine = Engine(Scheduler())
    core, control = engine.engine_core, EngineControl(engine)

    def step() -> None:
        core.scheduler.counts.add(
            StepTag("fp16", "", 0.0), StepReport("fp16", None, None, core.loads), 1, 1.0
        )

    assert (await control.status()).layers == {"nested": 4, "plain": 0}
    step()
    await control.status()
    assert core.rpcs == 1
    core.nested, core.loads = 3, 8
    step()
    assert (await control.status()).layers == {"nested": 3, "plain": 1}
    step()
    await control.status()
    assert core.rpcs == 2


@pytest.mark.parametrize(("checked", "mixed"), [(True, 6), (False, None)])
async def test_the_status_speaks_of_all_ranks(checked: bool, mixed: int | None) -> None:
    engine = Engine(Scheduler())
    core = engine.engine_core
    core.inexact_rows, core.mixed = [3, 0, 2], [1, 0, 5]
    for mismatches in (0, 4) if checked else (None,):
        report = StepReport("fp16", None, mismatches, core.loads)
        core.scheduler.counts.add(StepTag("fp16", "", 0.0), report, 1, 1.0)
    status = await EngineControl(engine).status()
    assert (status.inexact_rows, status.mixed_steps) == (5, mixed)
    assert core.rpcs == 1 + checked


async def test_a_refused_target_is_a_value_error() -> None:
    control = EngineControl(Engine(Scheduler()))
    with pytest.raises(ValueError, match="mode is 'int4'"):
        await control.set_target("int4")


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"command": "take_request_tokens"}, r"take_request_tokens: missing \['request_id'\], unknown \[\]"),
        ({"command": "status", "deep": True}, r"status: missing \[\], unknown \['deep'\]"),
        (
            {"command": "set_target", "mode": "fp8", "precision": 8},
            r"missing \['epoch'\], unknown \['precision'\]",
        ),
        (
            {"command": "stop"},
            r"unknown command 'stop', expected one of \['set_target', 'take_request_tokens'",
        ),
        ({}, "unknown command None"),
        ({"command": []}, r"unknown command \[\]"),
    ],
)
def test_a_malformed_command_is_answered(request_: dict[str, Any], error: str) -> None:
    answer = nestedfp_control(Core(Scheduler()), request_)
    assert answer.keys() == {"error"}
    assert re.search(error, answer["error"])


@pytest.mark.parametrize(
    "change", [{"epoch": "1"}, {"epoch": None}, {"limits": [1]}, {"limits": "x"}, {"mode": ["fp8"]}]
)
def test_a_target_of_the_wrong_types_is_a_value_error(change: dict[str, Any]) -> None:
    arguments = {"command": "set_target", "mode": "fp8", "epoch": 1, **change}
    scheduler = Scheduler()
    (name,) = change
    assert nestedfp_control(Core(scheduler), arguments)["error"].startswith(f"{name} is {change[name]!r}, ")
    assert (scheduler.selection.mode, scheduler.selection.epoch) == ("fp16", 0)


async def test_tokens_of_an_unknown_request_are_none() -> None:
    assert await EngineControl(Engine(Scheduler())).take_request_tokens("cmpl-1") is None


async def test_an_engine_with_another_scheduler_says_so() -> None:
    with pytest.raises(ValueError, match="scheduler is object, which takes no precision target"):
        await EngineControl(Engine(object())).status()


def test_a_status_of_another_version_names_the_fields() -> None:
    with pytest.raises(ValueError, match="unknown \\['speed'\\]"):
        EngineStatus.from_dict({"speed": 1})
