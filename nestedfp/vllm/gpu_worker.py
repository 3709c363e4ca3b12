"""The worker for GPU engines: a family of CUDA graphs for each plan, swapped at a flip."""

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.graphs import GraphBank, Holder, estimated_bytes
from nestedfp.vllm.plan import FP8, FP16, Plan
from nestedfp.vllm.warm_up import (
    distinct_layers,
    finish_compiling,
    run_products,
    tabled_counts,
    token_counts,
)
from nestedfp.vllm.worker import PrecisionMixin

logger = logging.getLogger("vllm.nestedfp")

_Worker: Any = compat.gpu_worker()


class PrecisionGPUWorker(PrecisionMixin, _Worker):  # type: ignore[misc]
    """vLLM's GPU worker with one captured graph family per plan."""

    model_config: Any
    cache_config: Any
    scheduler_config: Any
    parallel_config: Any
    compilation_config: Any
    kernels_s = 0.0
    """Time that the start spent on running kernels for the first time."""

    def init_device(self) -> None:
        super().init_device()
        compat.chain_launches(self.compilation_config)
        runner = self.model_runner
        self._graphs = GraphBank(lambda: [Holder(*found) for found in compat.graph_holders(runner)])
        self._capture_one = runner.capture_model
        runner.capture_model = self._capture_model

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        # vLLM measures before that memory is released, and 0.26 would keep it from the KV cache as weights.
        self.model_runner.model_memory_usage -= self.staging_bytes

    def _scoped_allocator_max_split(self, max_split_size_mb: int) -> AbstractContextManager[None]:
        """Leaves torch's allocator as it is while weights load; vLLM keeps it from cutting large blocks.

        Those of 20 MiB count as large, and are what it takes for a request of 1 to 10 MiB. Uncut, each serves
        one temporary of nesting and none after it: loading 15 GiB of weights was seen to take 78.
        """
        return nullcontext()

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: vLLM's figure, measured in FP8, whose activations take more room, less what
        of the kernels' workspaces and the plans' graphs vLLM knows nothing of."""
        # First, so that nothing is compiled within what vLLM measures and captures, and so that no KV cache
        # stands idle meanwhile.
        kept_bytes = self._warm_up_products()
        with _in_force(FP8):
            available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        if compat.measures_all_memory(self):
            kept_bytes = 0
        return available - kept_bytes - self._unestimated_graph_bytes()

    def compile_or_warm_up_model(self) -> Any:
        """Raises GraphFamilyError where a flip would not change the graphs that vLLM has captured."""
        times = super().compile_or_warm_up_model()
        if not self.model_config.enforce_eager:
            self._graphs.require(compat.batches_to_capture(self.model_runner), compat.captured_batch)
        return times

    def flip(self, plan: Plan) -> None:
        super().flip(plan)
        self._graphs.install(plan)

    def precision_facts(self) -> dict[str, Any]:
        return {**super().precision_facts(), "graphs": self._graphs.facts()}

    def _capture_model(self, **options: Any) -> int:
        """In place of the runner's own `capture_model`: once for each plan, FP16 last and left in force."""
        if options.get("profile_only"):
            taken: int = self._capture_one(**options)
            return taken
        named = [plan for plan in self.precision_settings.plans.values() if plan != FP16]

        def capture_under(plan: Plan) -> int:
            # vLLM locks its workspaces after the first capture. One that wanted to grow in a later pass
            # would leave the earlier graphs pointing at freed memory; it raises instead.
            compat.allow_graph_capture(True)
            with _in_force(plan):
                return int(self._capture_one(**options))

        try:
            return self._graphs.capture([*named, FP16], capture_under)
        finally:
            compat.allow_graph_capture(False)

    def _unestimated_graph_bytes(self) -> int:
        """For the families that vLLM did not subtract: all but one, or all where it estimates nothing."""
        sizes = len(self.compilation_config.cudagraph_capture_sizes or [])
        if self.model_config.enforce_eager or not sizes:
            return 0
        plans = len(self.precision_settings.plans)
        estimate: int = getattr(self, "cudagraph_memory_estimate", 0)
        chosen = self.precision_settings.graph_reserve_gib
        if estimate:
            reserve = estimate * (plans - 1)
        elif chosen is not None:
            reserve = int(plans * chosen * 2**30)
        else:
            layers = self.model_config.get_num_layers(self.parallel_config)
            reserve = estimated_bytes(plans, sizes, layers)
        logger.info("nestedfp: %.2f GiB kept free for the CUDA graphs of %d plans", reserve / 2**30, plans)
        return reserve

    def _warm_up_products(self) -> int:
        """Runs every configuration of the kernels that a step of this engine can meet, under every plan.

        Returns the bytes that kernels keep for good: their workspaces.
        """
        start = time.perf_counter()
        finish_compiling()
        before = torch.cuda.memory_allocated(self.device)
        layers = distinct_layers(self.model_runner.get_model())
        counts = token_counts(self.scheduler_config.max_num_batched_tokens, tabled_counts(self.device))
        for plan in self.precision_settings.plans.values():
            with _in_force(plan):
                run_products(layers, counts, self.model_config.dtype)
        torch.accelerator.synchronize()
        kept_bytes: int = torch.cuda.memory_allocated(self.device) - before
        self.kernels_s = time.perf_counter() - start
        logger.info(
            "nestedfp: kernels warmed up in %.1f s, %.2f GiB of workspaces",
            self.kernels_s, kept_bytes / 2**30,
        )  # fmt: skip
        return kept_bytes


@contextmanager
def _in_force(plan: Plan) -> Iterator[None]:
    """A plan in force while the engine starts, and FP16 after it."""
    ACTIVE.plan = plan
    try:
        yield
    finally:
        ACTIVE.plan = FP16
