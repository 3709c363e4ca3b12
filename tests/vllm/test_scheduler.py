"""The scheduler mixin over a stand-in for vLLM's scheduler."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.policies.steps import LIMIT_NAMES
from nestedfp.vllm.config import NestedFPConfig
from nestedfp.vllm.control import STRICT_CACHE_SALT
from nestedfp.vllm.scheduler import PrecisionMixin
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.step import REPORT, TAG, StepReport


class BaseScheduler:
    """Schedules what it is told to; several steps may be in flight."""

    def __init__(self, *, aligned: bool = False, **scheduler_config: bool) -> None:
        chosen = {"enable_chunked_prefill": True, "disable_chunked_mm_input": False, **scheduler_config}
        self.scheduler_config = SimpleNamespace(**chosen)
        self.need_mamba_block_aligned_split = aligned
        config = NestedFPConfig(Settings())
        self.vllm_config = SimpleNamespace(quant_config=config, model_config=None)
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.next: dict[str, int] = {}
        self.finished: set[str] = set()
        self.updated = 0
        self.max_num_scheduled_tokens = 2048
        self.allowed: list[int] = []

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.requests) - len(self.waiting), len(self.waiting)

    def schedule(self, throttle_prefills: bool = False) -> Any:
        self.allowed.append(self.max_num_scheduled_tokens)
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


def request(
    request_id: str,
    *,
    made: int = 0,
    computed: int = 8,
    prompt: int = 40,
    age_s: float = 2.0,
    salt: str | None = None,
    **extra_args: Any,
) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=request_id,
        sampling_params=SimpleNamespace(extra_args=extra_args or None),
        cache_salt=salt,
        mm_features=[],
        arrival_time=time.time() - age_s,
        num_prompt_tokens=prompt,
        num_computed_tokens=computed,
        num_output_tokens=made,
        num_tokens=prompt + made,
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


@pytest.mark.parametrize(
    ("salt", "plan"),
    [(STRICT_CACHE_SALT, "fp16"), (f"{STRICT_CACHE_SALT}:mine", "fp16"), ("mine", "fp8"), (None, "fp8")],
)
def test_nothing_is_computed_in_fp8_under_the_salt_of_strict_requests(
    scheduler: Scheduler, salt: str | None, plan: str
) -> None:
    """Beam search sends its requests with the salt, and without the argument."""
    scheduler.selection.set_target("fp8", 1)
    scheduler.add_request(request("beam", salt=salt))
    assert getattr(scheduler.step(beam=1), TAG).plan == plan


def test_encoder_outputs_of_fp8_steps_are_not_reused_by_strict_requests(scheduler: Scheduler) -> None:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    image = MultiModalFeatureSpec(None, "image", "hash of the image", PlaceholderRange(offset=0, length=4))
    requests = {
        "a": request("a"),
        "s": request("s", salt=STRICT_CACHE_SALT),
        "t": request("t", nestedfp_precision="fp16"),
    }
    for each in requests.values():
        each.mm_features = [image]
        each.get_num_encoder_embeds = lambda position: 4
        scheduler.add_request(each)
    cache = EncoderCacheManager(cache_size=64)
    cache.allocate(requests["a"], 0)
    assert not cache.check_and_update_cache(requests["s"], 0)
    cache.allocate(requests["s"], 0)
    assert cache.check_and_update_cache(requests["t"], 0), "strict ones share theirs"


BOUNDS = {
    **dict.fromkeys(LIMIT_NAMES, 0.0),
    "pace_s": 0.03,
    "tpot_s": 0.033,
    "ttft_s": 0.7,
    "late_s": 1.0,
    "least_tokens": 64.0,
    "fp16_token_s": 1e-4,
    "fp8_token_s": 5e-5,
}


def test_bounds_hold_the_size_of_a_step_and_choose_its_precision(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr("nestedfp.vllm.scheduler.time.monotonic", lambda: clock[0])

    def step(age_s: float) -> Any:
        scheduler.waiting = [request("b", age_s=age_s, prompt=5000)]
        output = scheduler.step(a=1, b=99)
        clock[0] += 0.01
        scheduler.finish(output)
        scheduler.running[0].num_output_tokens += 1
        return getattr(output, TAG)

    scheduler.selection.set_target("auto", 1, limits=BOUNDS)
    scheduler.running = [request("a", made=1, computed=40, age_s=0.5)]
    assert step(0.1).plan == "fp16"
    # A next token is due in 30 ms, of which 95 % are planned with: 285 tokens, one of them the request's own.
    assert scheduler.allowed == [pytest.approx(285, abs=1)]
    assert scheduler.max_num_scheduled_tokens == 2048, "for this step alone"
    urgent = step(0.6)
    assert urgent.plan == "fp8"
    assert urgent.reason.startswith("auto: in FP8 a first token would come after")
    assert step(3.0).plan == "fp16", "the queue is lost"
    status = scheduler.precision_status({"layers": {}, "plain_reasons": {}})
    assert status.bounded_steps == 3
    scheduler.selection.set_target("auto", 2)
    scheduler.step(a=1)
    assert scheduler.allowed[-1] == 2048


@pytest.mark.parametrize(("mode", "tokens"), [("fp16", 313), ("fp8", 627)])
def test_a_fixed_precision_is_held_to_what_the_slo_leaves(
    scheduler: Scheduler, mode: str, tokens: int
) -> None:
    scheduler.selection.set_target(mode, 1, limits=BOUNDS)
    scheduler.running = [request("a", made=1, computed=40, age_s=0.5)]
    scheduler.waiting = [request("b", age_s=0.1, prompt=5000)]
    assert getattr(scheduler.step(a=1, b=200), TAG).plan == mode
    assert scheduler.allowed == [pytest.approx(tokens, abs=1)]


@pytest.mark.parametrize(
    "unsplit", [{"enable_chunked_prefill": False}, {"disable_chunked_mm_input": True}, {"aligned": True}]
)
@pytest.mark.parametrize(("mode", "plan"), [("fp16", "fp16"), ("fp8", "fp8"), ("auto", "fp8")])
def test_a_prompt_that_cannot_be_split_is_not_starved(unsplit: dict[str, bool], mode: str, plan: str) -> None:
    scheduler = Scheduler(**unsplit)
    scheduler.selection.set_target(mode, 1, limits=BOUNDS)
    scheduler.running = [request("a", made=1, computed=40, age_s=0.5)]
    scheduler.waiting = [request("b", age_s=0.1, prompt=1500)]
    assert getattr(scheduler.step(a=1, b=1500), TAG).plan == plan
    assert scheduler.allowed == [2048]


def test_a_step_with_a_strict_request_is_held_to_what_16_bits_compute(scheduler: Scheduler) -> None:
    scheduler.selection.set_target("fp8", 1, limits=BOUNDS)
    scheduler.add_request(request("s", nestedfp_precision="fp16"))
    scheduler.running = [request("s", made=1, computed=40, age_s=0.5)]
    scheduler.waiting = [request("b", age_s=0.1, prompt=5000)]
    assert getattr(scheduler.step(s=1, b=200), TAG).plan == "fp16"
    assert scheduler.allowed == [pytest.approx(313, abs=1)]


@pytest.mark.parametrize("mode", ["fp8", "auto"])
@pytest.mark.parametrize(
    ("before", "tokens"),
    [((), 313), ((200, 300), 313), ((500, 500), 627)],
    ids=["first", "reached", "behind"],
)
def test_a_step_that_may_admit_a_strict_request_is_no_larger_than_16_bits_allow(
    scheduler: Scheduler, mode: str, before: tuple[int, ...], tokens: int
) -> None:
    """Its precision shows once it is composed: in 16 bits with the request, in FP8 without."""
    scheduler.selection.set_target(mode, 1, limits=BOUNDS)
    scheduler.running = [request("a", made=1, computed=40, age_s=0.5)]
    scheduler.waiting = [request(f"p{i}", age_s=0.6, prompt=8 + left) for i, left in enumerate(before)]
    scheduler.add_request(request("s", nestedfp_precision="fp16", age_s=0.6, prompt=5008))
    assert getattr(scheduler.step(a=1, p=200), TAG).plan == "fp8"
    assert getattr(scheduler.step(a=1, s=200), TAG).plan == "fp16"
    assert scheduler.allowed[0] == pytest.approx(tokens, abs=1)


def test_steps_in_flight_take_the_time_of_the_next(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [10.0]
    monkeypatch.setattr("nestedfp.vllm.scheduler.time.monotonic", lambda: clock[0])
    scheduler.selection.set_target("auto", 1, limits=BOUNDS)
    scheduler.running = [request("a", made=1, computed=40, age_s=0.5)]
    scheduler.waiting = [request("b", age_s=0.1, prompt=5000)]
    flying = scheduler.step(a=1, b=99)
    scheduler.running[0].num_output_placeholders = 1
    scheduler.step(a=1, b=99)
    # Two tokens are due after 60 ms, and 10 of them go to the 100 tokens in flight.
    assert scheduler.allowed[1] == pytest.approx((0.95 * 0.05) / 1e-4, abs=1)
    clock[0] = 10.02
    scheduler.finish(flying)
    corrections = scheduler.precision_status({"layers": {}, "plain_reasons": {}}).step_corrections
    assert corrections == {"fp16": pytest.approx(2.0**0.05)}


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
