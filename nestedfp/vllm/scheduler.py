"""vLLM's schedulers, with a plan chosen for every step.

The tag travels inside the `SchedulerOutput` to all ranks, so that every rank runs the step under the
plan it was scheduled with, however many steps are in flight.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nestedfp.vllm import compat
from nestedfp.vllm.accounting import RequestTokens, StepCounts
from nestedfp.vllm.choice import StepFacts
from nestedfp.vllm.config import settings_of
from nestedfp.vllm.control import PRECISION_ARGUMENT, STRICT_CACHE_SALT
from nestedfp.vllm.progress import Progress
from nestedfp.vllm.selection import BoundedStep, PlanSelection
from nestedfp.vllm.status import EngineStatus
from nestedfp.vllm.step import REPORT, TAG, StepReport, StepTag
from nestedfp.vllm.step_times import StepTimes

# Under vLLM's own logger, which is the only one that its processes configure.
logger = logging.getLogger("vllm.nestedfp")

_Scheduler: Any
_AsyncScheduler: Any
_Scheduler, _AsyncScheduler = compat.schedulers()


class PrecisionMixin:
    """Tags each step that has tokens, and counts what the workers report to have run."""

    # vLLM's scheduler, which comes after this class in the method resolution order.
    requests: dict[str, Any]
    waiting: Any
    kv_cache_manager: Any
    running: list[Any]
    scheduler_config: Any
    need_mamba_block_aligned_split: bool
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config)  # type: ignore[attr-defined]
        self.selection = PlanSelection(settings, prompts_split=self._prompts_split())
        self.progress = Progress()
        self.counts = StepCounts(settings.plans)
        self.request_tokens = RequestTokens()
        self._times: StepTimes | None = None
        self._batch_context = 0.0

    def add_request(self, request: Any) -> None:
        self.request_tokens.open(request.request_id)
        if is_strict(request):
            self.selection.pin(request.request_id)
            # The encoder cache goes by these and knows no salt: the output of an FP8 step would be reused.
            # New ones, as the samples of a prompt share them.
            request.mm_features = [
                replace(feature, identifier=f"{STRICT_CACHE_SALT}:{feature.identifier}")
                for feature in request.mm_features
            ]
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        bounded = self._bound()
        most_tokens = self.max_num_scheduled_tokens
        if bounded is not None:
            self.max_num_scheduled_tokens = min(most_tokens, bounded.tokens)
        try:
            output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.max_num_scheduled_tokens = most_tokens
        self.selection.unpin(output.finished_req_ids)
        self.progress.forget(output.finished_req_ids)
        if output.total_num_scheduled_tokens:
            scheduled, tokens = output.num_scheduled_tokens, output.total_num_scheduled_tokens
            plan, reason = self.selection.select(scheduled, lambda: self._facts(tokens), bounded)
            now = time.monotonic()
            setattr(output, TAG, StepTag(plan, reason, now))
            if self._times is not None:
                self._times.scheduled(plan, tokens, len(scheduled), self._batch_context, now)
            if bounded is not None and bounded.tokens < most_tokens:
                self.counts.bounded_steps += 1
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            tag: StepTag = getattr(scheduler_output, TAG)
            report: StepReport | None = getattr(model_runner_output, REPORT, None)
            if report is None:
                raise RuntimeError(
                    "the worker sent no precision report with its output; start the engine with the "
                    "worker_cls of nestedfp.vllm.engine_arguments()"
                )
            scheduled = scheduler_output.num_scheduled_tokens
            tokens = scheduler_output.total_num_scheduled_tokens
            now = time.monotonic()
            self.counts.add(tag, report, tokens, now)
            if self._times is not None:
                self._times.finished(tag.scheduled_at, now)
            self.request_tokens.add(scheduled, report.plan)
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def precision_status(self, worker_facts: Mapping[str, Any]) -> EngineStatus:
        """The state now; `worker_facts` is what the worker told about its layers and graphs."""
        running, waiting = self.get_request_counts()  # type: ignore[attr-defined]
        now = time.time()
        arrivals = [request.arrival_time for request in self.waiting]
        prompt_tokens = sum(
            max(0, request.num_prompt_tokens - request.num_computed_tokens) for request in self.waiting
        )
        counts = self.counts
        return EngineStatus(
            mode=self.selection.mode,
            epoch=self.selection.epoch,
            current=counts.current,
            steps=dict(counts.steps),
            tokens=dict(counts.tokens),
            flips=counts.flips,
            last_flip_seconds=counts.last_flip_seconds,
            last_flip_reason=counts.last_flip_reason,
            mixed_steps=counts.mixed_steps,
            running=running,
            waiting=waiting,
            waiting_prompt_tokens=prompt_tokens,
            oldest_waiting_s=max(0.0, now - min(arrivals)) if arrivals else 0.0,
            kv_usage=self.kv_cache_manager.usage,
            step_time_s=dict(counts.step_time_s),
            batch_tokens=dict(counts.batch_tokens),
            strict_running=self.selection.strict_count,
            at=time.monotonic(),
            bounded_steps=counts.bounded_steps,
            step_corrections={} if self._times is None else dict(self._times.corrections),
            context_tokens=sum(request.num_computed_tokens for request in self.running),
            **worker_facts,
        )

    def _prompts_split(self) -> bool:
        """Whether any budget lets each prompt on. vLLM waits for one that holds an unsplit prompt or image
        whole, or the block that a state-space layer aligns to."""
        return (
            self.scheduler_config.enable_chunked_prefill
            and not self.scheduler_config.disable_chunked_mm_input
            and not self.need_mamba_block_aligned_split
        )

    def _facts(self, tokens: int) -> StepFacts:
        _, waiting = self.get_request_counts()  # type: ignore[attr-defined]
        return StepFacts(tokens, waiting, self.kv_cache_manager.usage)

    def _bound(self) -> BoundedStep | None:
        """What the step to be composed may be; None where the target came without bounds."""
        limits = self.selection.limits
        if limits.steps is None:
            self._times = None
            self.progress.clear()
            return None
        if self._times is None or self._times.terms != limits.steps.terms:
            self._times = StepTimes(limits.steps.terms)
        now = time.monotonic()
        work = self.progress.work(
            self.running,
            self.waiting,
            limits.steps.bounds,
            self._times.of("fp8"),
            now=now,
            wall=time.time(),
            ahead_s=self._times.ahead_s(now),
            most_tokens=self.max_num_scheduled_tokens,
            crowded=self.kv_cache_manager.usage >= limits.kv_high,
        )
        self._batch_context = work.context
        running = (request.request_id for request in self.running)
        queue = (
            (request.request_id, request.num_tokens - request.num_computed_tokens) for request in self.waiting
        )
        return self.selection.bound(work, self._times.of, running, queue)


def is_strict(request: Any) -> bool:
    """Whether a request insists on 16 bits; an unknown value is logged and counts as no wish.

    The salt of strict requests insists, too, followed by `:` and a client's own or not. vLLM's beam search
    keeps the salt and loses the argument, and what is computed under the salt strict requests reuse.
    """
    arguments = getattr(request.sampling_params, "extra_args", None) or {}
    value = arguments.get(PRECISION_ARGUMENT)
    if value not in (None, "any", "fp16"):
        logger.warning("%s is %r, expected 'fp16' or 'any'; ignored", PRECISION_ARGUMENT, value)
    salt = (request.cache_salt or "").partition(":")[0]
    return value == "fp16" or salt == STRICT_CACHE_SALT


class PrecisionScheduler(PrecisionMixin, _Scheduler):  # type: ignore[misc]
    """For a CPU, or with asynchronous scheduling off."""


class AsyncPrecisionScheduler(PrecisionMixin, _AsyncScheduler):  # type: ignore[misc]
    """For a GPU."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if not vllm_config.scheduler_config.async_scheduling:
            raise ValueError(
                "AsyncPrecisionScheduler needs asynchronous scheduling; without it, set "
                "scheduler_cls=nestedfp.vllm.scheduler.PrecisionScheduler"
            )
        super().__init__(vllm_config, *args, **kwargs)
