"""The worker for CPU engines."""

from nestedfp.vllm import compat
from nestedfp.vllm.worker import PrecisionMixin

_CPUWorker = compat.cpu_worker()


class PrecisionCPUWorker(PrecisionMixin, _CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker: no graphs, so a flip is one assignment."""
