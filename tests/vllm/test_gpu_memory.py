"""What the GPU worker leaves to the KV cache, over stand-ins for vLLM's ways to measure it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nestedfp.vllm import gpu_worker
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.gpu_worker import PrecisionGPUWorker
from nestedfp.vllm.linear import STAGING
from nestedfp.vllm.settings import Settings

WEIGHTS, WORKSPACES, REQUESTED = 10_000, 300, 50_000


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> PrecisionGPUWorker:
    """Loads a model of one layer, whose measurement ends before the worker can release anything."""

    def load_model(self: Any) -> None:
        STAGING.planes(torch.zeros(16, 8))
        self.model_runner.model_memory_usage = WEIGHTS + 2 * 16 * 8

    def warm_up_products(self: Any) -> int:
        return WORKSPACES

    def unestimated_graph_bytes(self: Any) -> int:
        return 0

    monkeypatch.setattr(gpu_worker._Worker, "load_model", load_model)
    monkeypatch.setattr(PrecisionGPUWorker, "_warm_up_products", warm_up_products)
    monkeypatch.setattr(PrecisionGPUWorker, "_unestimated_graph_bytes", unestimated_graph_bytes)
    worker = object.__new__(PrecisionGPUWorker)
    worker.precision_settings = Settings()
    worker.vllm_config = SimpleNamespace(additional_config={})
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=None)
    worker.device = torch.device("meta")
    worker.model_runner = SimpleNamespace(get_model=torch.nn.Module)
    ACTIVE.clear()
    return worker


def of_parts(self: Any) -> int:
    """As 0.26 does."""
    return REQUESTED - int(self.model_runner.model_memory_usage)


def of_all_that_is_gone(self: Any) -> int:
    """As 0.32 does."""
    self.total_consumed = WEIGHTS + WORKSPACES
    return REQUESTED - int(self.total_consumed)


@pytest.mark.parametrize("measure", [of_parts, of_all_that_is_gone])
def test_the_kv_cache_lacks_the_weights_and_the_workspaces_once(
    worker: PrecisionGPUWorker, monkeypatch: pytest.MonkeyPatch, measure: Any
) -> None:
    monkeypatch.setattr(gpu_worker._Worker, "determine_available_memory", measure)
    worker.load_model()
    assert worker.determine_available_memory() == REQUESTED - WEIGHTS - WORKSPACES
