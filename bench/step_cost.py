"""The host's time that the plugin adds to a step: microseconds at several batch sizes.

    python bench/step_cost.py

The plugin's part of `schedule`, `execute_model` and `update_from_output`, over stand-ins that do nothing; the
scheduler's two overlap the GPU's work on the step before.
"""

import time
from types import SimpleNamespace
from typing import Any

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.bounds import step_bounds
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.config import NestedFPConfig
from nestedfp.vllm.scheduler import PrecisionMixin as SchedulerMixin
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.worker import PrecisionMixin as WorkerMixin

BATCHES = (32, 256, 512)
STEPS, ROUNDS = 200, 7
TARGETS: dict[str, tuple[str, dict[str, float]]] = {
    "fp16": ("fp16", {}),
    "auto": ("auto", {}),
    "auto with bounds": ("auto", dict(step_bounds(PolicyConfig()))),
}


def vllm_config() -> SimpleNamespace:
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1, data_parallel_index=0)
    return SimpleNamespace(
        quant_config=NestedFPConfig(Settings()),
        model_config=None,
        parallel_config=parallel,
        lora_config=None,
        speculative_config=None,
        compilation_config=SimpleNamespace(cudagraph_mm_encoder=False),
    )


class NoScheduler:
    def __init__(self, batch: int) -> None:
        self.vllm_config = vllm_config()
        self.scheduler_config = SimpleNamespace(enable_chunked_prefill=True, disable_chunked_mm_input=False)
        self.need_mamba_block_aligned_split = False
        self.kv_cache_manager = SimpleNamespace(usage=0.25)
        self.max_num_scheduled_tokens = 2048
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self.requests: dict[str, Any] = {}
        self.next = {f"cmpl-{number:08x}-0-0123abcd": 1 for number in range(batch)}

    def add_request(self, request: Any) -> None:
        self.requests[request.request_id] = request

    def get_request_counts(self) -> tuple[int, int]:
        return len(self.requests), 0

    def schedule(self) -> Any:
        return SimpleNamespace(
            num_scheduled_tokens=self.next,
            total_num_scheduled_tokens=len(self.next),
            finished_req_ids=(),
        )

    def update_from_output(self, scheduled: Any, output: Any) -> None:
        return None


class NoWorker:
    def __init__(self, config: Any) -> None:
        self._output = SimpleNamespace()

    def execute_model(self, scheduled: Any) -> Any:
        return self._output


class Scheduler(SchedulerMixin, NoScheduler):
    pass


class Worker(WorkerMixin, NoWorker):
    pass


def step_us(batch: int, mode: str, limits: dict[str, float]) -> tuple[float, float]:
    """Of the scheduler and of the worker: the least of several rounds."""
    ACTIVE.record = None
    scheduler, worker = Scheduler(batch), Worker(vllm_config())
    for request_id in scheduler.next:
        request = SimpleNamespace(
            request_id=request_id,
            sampling_params=None,
            cache_salt=None,
            arrival_time=0.0,
            num_prompt_tokens=100,
            num_computed_tokens=108,
            num_output_tokens=9,
        )
        scheduler.add_request(request)
        scheduler.running.append(request)
    scheduler.selection.set_target(mode, 0, limits=limits)
    least = [float("inf")] * 2
    for _ in range(ROUNDS):
        spent = [0.0, 0.0]
        for _ in range(STEPS):
            start = time.perf_counter()
            scheduled = scheduler.schedule()
            tagged = time.perf_counter()
            output = worker.execute_model(scheduled)
            ran = time.perf_counter()
            scheduler.update_from_output(scheduled, output)
            spent[0] += tagged - start + time.perf_counter() - ran
            spent[1] += ran - tagged
        least = [min(pair) for pair in zip(least, spent, strict=True)]
    scheduler_us, worker_us = (1e6 * seconds / STEPS for seconds in least)
    return scheduler_us, worker_us


def main() -> None:
    for label, (mode, limits) in TARGETS.items():
        for batch in BATCHES:
            scheduler_us, worker_us = step_us(batch, mode, limits)
            print(f"{label:18} batch {batch:4}: scheduler {scheduler_us:6.1f} us, worker {worker_us:5.1f} us")


if __name__ == "__main__":
    main()
