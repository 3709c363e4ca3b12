"""The worker for CPU engines."""

from typing import Any

from nestedfp.kernels import cpu
from nestedfp.vllm import compat
from nestedfp.vllm.worker import PrecisionMixin

_CPUWorker: Any = compat.cpu_worker()


class PrecisionCPUWorker(PrecisionMixin, _CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker: no graphs, so a flip is one assignment."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        cpu.warm_up()
