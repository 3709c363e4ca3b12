"""The scheduler mixin over a stand-in for vLLM's scheduler."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.vllm.config import NestedFPConfig
from nestedfp.vllm.scheduler import PrecisionMixin
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.step import REPORT, TAG, StepReport


class BaseScheduler:
    """Schedules what it is told to; several steps may be in flight."""

    def __init__(self) -> None:
        config = NestedFPConfig(Settings())
        self.vllm_config = SimpleNamespace(quant_config=config, model_config=None)
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.next: dict[str, int] = {}
        self.finished: set[str] = set()
        self.updated = 0

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.requests) - len(self.waiting), len(self.waiting)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        output = SimpleNamespace(
            num_scheduled_tokens=dict(self.next),
            total_num_scheduled_tokens=sum(self.next.values()),
            finished_req_ids=self.finished,
        )
        self.finished = set()
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> str:
        self.updated += 1
        return "outputs"


class Scheduler(PrecisionMixin, BaseScheduler):
    def step(self, **tokens: int) -> Any:
        self.next = tokens
        return self.schedule(throttle_prefills=True)

    def finish(self, output: Any, plan: str | None = None) -> Any:
        tag = getattr(output, TAG, None)
        report = SimpleNamespace()
        if tag:
            setattr(report, REPORT, StepReport(plan or tag.plan, None, 0))
        return self.update_from_output(output, report)


def request(request_id: str, **extra_args: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=request_id,
        sampling_params=SimpleNamespace(extra_args=extra_args or None),
        arrival_time=time.time() - 2.0,
        num_prompt_tokens=40,
        num_computed_tokens=8,
    )


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def test_a_new_target_reaches_the_next_step_and_not_those_in_flight(scheduler: Scheduler) -> None:
    first = scheduler.step(a=4)
    scheduler.selection.set_target("fp8", 1)
    second = scheduler.step(a=1)
    assert [getattr(output, TAG).plan for output in (first, second)] == ["fp16", "fp8"]
    assert scheduler.finish(first) == "outputs"
    scheduler.finish(second)
    assert scheduler.counts.tokens == {"fp16": 4, "fp8": 1}
    assert scheduler.counts.flips == 1


def test_an_empty_step_is_not_tagged_and_not_counted(scheduler: Scheduler) -> None:
    output = scheduler.step()
    assert not hasattr(output, TAG)
    scheduler.finish(output)
    assert sum(scheduler.counts.steps.values()) == 0


def test_tokens_are_counted_where_they_ran_not_where_they_should_have(scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    scheduler.selection.set_target("fp8", 1)
    scheduler.finish(scheduler.step(a=7), plan="fp16")
    assert scheduler.counts.tokens == {"fp16": 7, "fp8": 0}
    assert scheduler.counts.mixed_steps == 1
    assert scheduler.request_tokens.take("a") == {"fp16": 7, "fp8": 0}


def test_a_strict_request_pins_its_steps_until_it_is_finished(scheduler: Scheduler) -> None:
    scheduler.selection.set_target("fp8", 1)
    scheduler.add_request(request("a"))
    scheduler.add_request(request("s", nestedfp_precision="fp16"))
    assert getattr(scheduler.step(a=1, s=1), TAG).plan == "fp16"
    assert getattr(scheduler.step(a=1), TAG).plan == "fp8"
    scheduler.finished = {"s"}
    assert getattr(scheduler.step(a=1), TAG).plan == "fp8"
    assert scheduler.selection.strict_count == 0


def test_a_pace_puts_only_steps_in_fp8_that_would_break_it(scheduler: Scheduler) -> None:
    scheduler.selection.set_target("auto", 1, limits={"pace_s": 0.03, "token_s": 1e-4})
    scheduler.add_request(request("a"))
    scheduler.requests["a"].num_output_tokens = 1
    scheduler.waiting.clear()
    assert getattr(scheduler.step(a=1), TAG).plan == "fp16"
    large = getattr(scheduler.step(a=1, b=400), TAG)
    assert (large.plan, large.reason[:5]) == ("fp8", "auto:")
    scheduler.selection.set_target("auto", 2, limits={"pace_s": 0.03, "token_s": 1e-4, "wait_s": 1.0})
    scheduler.waiting.append(request("b"))
    assert "oldest_wait_s" in getattr(scheduler.step(a=1), TAG).reason
    late = {"pace_s": 0.03, "token_s": 1e-4, "wait_s": 1.0, "queue_tokens": 1.0, "late_s": 1.5}
    scheduler.selection.set_target("auto", 3, limits=late)
    assert getattr(scheduler.step(a=1), TAG).plan == "fp16", "the queue is lost"


def test_an_unknown_precision_class_is_no_pin(scheduler: Scheduler) -> None:
    scheduler.add_request(request("a", nestedfp_precision="fp4"))
    assert scheduler.selection.strict_count == 0


def test_a_worker_that_does_not_report_is_an_error(scheduler: Scheduler) -> None:
    output = scheduler.step(a=1)
    with pytest.raises(RuntimeError, match="the worker sent no precision report"):
        scheduler.update_from_output(output, SimpleNamespace())


def test_the_status_tells_the_queue(scheduler: Scheduler) -> None:
    scheduler.add_request(request("a"))
    scheduler.running = [SimpleNamespace(num_computed_tokens=tokens) for tokens in (30, 12)]
    status = scheduler.precision_status({"layers": {}, "plain_reasons": {}})
    assert status.context_tokens == 42
    assert (status.running, status.waiting, status.waiting_prompt_tokens) == (0, 1, 32)
    assert status.oldest_waiting_s == pytest.approx(2.0, abs=0.5)
    assert status.kv_usage == 0.25


def test_the_queue_is_timed_from_the_step_that_left_it(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr("nestedfp.vllm.scheduler.time.monotonic", lambda: clock[0])

    def queued_s() -> float:
        return scheduler.precision_status({"layers": {}, "plain_reasons": {}}).queued_s

    scheduler.add_request(request("a"))
    assert queued_s() == 0.0
    scheduler.finish(scheduler.step(b=1))
    clock[0] = 12.0
    scheduler.finish(scheduler.step(b=1))
    assert queued_s() == 2.0
    scheduler.waiting.clear()
    scheduler.finish(scheduler.step(a=1, b=1))
    assert queued_s() == 0.0
    assert scheduler.precision_status({"layers": {}, "plain_reasons": {}}).step_sizes["fp16"][2][:3] == [
        1,
        2,
        2,
    ]
