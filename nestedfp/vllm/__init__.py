"""The vLLM plugin: nested linear layers and a precision that changes from one step to the next.

`register` is the `vllm.general_plugins` entry point; vLLM calls it in each of its processes.
`engine_arguments` switches the plugin on.
"""

import logging
from typing import Any

from nestedfp.vllm import compat
from nestedfp.vllm.settings import METHOD, Settings

_CLASSES = {
    "cpu": {
        "scheduler_cls": "nestedfp.vllm.scheduler.PrecisionScheduler",
        "worker_cls": "nestedfp.vllm.cpu_worker.PrecisionCPUWorker",
    },
    "cuda": {
        "scheduler_cls": "nestedfp.vllm.scheduler.AsyncPrecisionScheduler",
        "worker_cls": "nestedfp.vllm.gpu_worker.PrecisionGPUWorker",
    },
}


def register() -> None:
    """Makes `quantization="nestedfp"` known to vLLM, unless this vLLM's version is not supported.

    That is logged and not raised: the entry point also runs for engines that do not use the plugin.
    """
    try:
        compat.check_version(compat.installed_version())
    except compat.UnsupportedVLLMError as error:
        logging.getLogger("vllm.nestedfp").error("nestedfp is not registered: %s", error)
        return
    from nestedfp.vllm import core
    from nestedfp.vllm.config import NestedFPConfig

    compat.register_quantization(METHOD, NestedFPConfig)
    core.install(compat.engine_core())


def engine_arguments(device: str = "cuda", **settings: Any) -> dict[str, Any]:
    """Keyword arguments for vLLM's `EngineArgs`, `AsyncEngineArgs` or `LLM` that switch the plugin on.

    `settings` are the keys of `nestedfp.vllm.settings.Settings.from_dict`: inexact, plans, target, limits,
    check_steps, fuse_silu. Raises UnsupportedVLLMError for an unknown vLLM and ValueError for a bad setting.
    """
    compat.check_version(compat.installed_version())
    Settings.from_dict(settings)
    if device not in _CLASSES:
        raise ValueError(f"device is {device!r}, expected one of {sorted(_CLASSES)}")
    return {
        "quantization": METHOD,
        "hf_overrides": {"quantization_config": {"quant_method": METHOD, **settings}},
        **_CLASSES[device],
    }
