"""vLLM's OpenAI server as a library: the one module whose imports depend on the version of vLLM.

What is used and where it lives:

| under `vllm.entrypoints` | 0.26 | 0.32 |
|---|---|---|
| `build_app` | `openai.api_server` | `launchers.app` |
| `init_app_state` | `openai.api_server` | `launchers.api_server.app_state` |
| `make_arg_parser` | `openai.cli_args` | `launchers.cli_args` |

Run with 0.32 on CPUs and with 0.26 on H100s and H200s. The older places are tried where the newer ones do not
exist, so for the versions in between it does not matter which of them moved what. Everything else that the
deployment needs from vLLM (`AsyncLLM`, `AsyncEngineArgs`, `StatLoggerBase`) has kept its place.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Final

from nestedfp.deployments.arrival import arrived_at
from nestedfp.deployments.asgi import App
from nestedfp.policies.checks import InvalidField
from nestedfp.vllm import compat

_PLACES: Final[Mapping[str, tuple[str, ...]]] = {
    "build_app": ("vllm.entrypoints.launchers.app", "vllm.entrypoints.openai.api_server"),
    "init_app_state": (
        "vllm.entrypoints.launchers.api_server.app_state",
        "vllm.entrypoints.openai.api_server",
    ),
    "make_arg_parser": ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args"),
}
_BEAM: Final = "-beam-"
"""In the names of the requests that vLLM makes of a beam search."""


class UnsupportedVllm(ImportError):
    """This vLLM has what the deployment needs at none of the known places."""


def vllm_version() -> str:
    """The installed vLLM's version, or `absent`."""
    try:
        return compat.installed_version()
    except compat.UnsupportedVLLMError:
        return "absent"


def server_arguments(model: str, served_model_name: str, arguments: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments of `vllm serve` with those given set by name.

    Raises :class:`InvalidField` for a name that this vLLM does not know.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed: argparse.Namespace = _find("make_arg_parser")(FlexibleArgumentParser()).parse_args([])
    given = {**arguments, "model": model, "served_model_name": [served_model_name]}
    for name, value in given.items():
        if not hasattr(parsed, name):
            raise InvalidField(
                f"engine.arguments.{name}",
                value,
                f"remove it: `vllm serve` {vllm_version()} has no such argument",
            )
        setattr(parsed, name, value)
    return parsed


def start_engine(arguments: argparse.Namespace, stat_loggers: list[Callable[..., Any]]) -> Any:
    """Start an `AsyncLLM` in the running event loop; returns when the weights are loaded.

    Its requests count as arrived when they reached the proxy.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    class ServedLLM(AsyncLLM):  # type: ignore[misc]
        async def add_request(
            self,
            request_id: str,
            prompt: Any,
            params: Any,
            arrival_time: float | None = None,
            *rest: Any,
            **more: Any,
        ) -> Any:
            # A beam's every token is a request of its own: it does not begin with the client's.
            if arrival_time is None and _BEAM not in request_id:
                arrival_time = arrived_at()
            return await super().add_request(request_id, prompt, params, arrival_time, *rest, **more)

    return ServedLLM.from_engine_args(AsyncEngineArgs.from_cli_args(arguments), stat_loggers=stat_loggers)


async def build_openai_app(engine: Any, arguments: argparse.Namespace) -> App:
    """vLLM's own FastAPI application on `engine`, ready to be served."""
    build, init_state = _find("build_app"), _find("init_app_state")
    tasks = await engine.get_supported_tasks()
    # Parameters were added over the versions: pass those that this one knows.
    app = build(arguments, **_known(build, supported_tasks=tasks, model_config=engine.model_config))
    await init_state(engine, app.state, arguments, **_known(init_state, supported_tasks=tasks))
    # After the engine's death vLLM's error handler tells its HTTP server to stop. Serve owns the server
    # here, and the replica watches the engine by itself.
    app.state.server = SimpleNamespace(should_exit=False)
    wrapped: App = app
    return wrapped


def stat_logger(record: Callable[[Any, Any], None]) -> Callable[..., Any]:
    """A stat-logger factory that hands every step's scheduler and iteration statistics to `record`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepListener(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            record(scheduler_stats, iteration_stats)

        def log_engine_initialized(self) -> None:
            pass

    return StepListener


def ray_stat_logger() -> Callable[..., Any]:
    """vLLM's own metrics under their own names, exported by Ray with the replica's id."""
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    factory: Callable[..., Any] = RayPrometheusStatLogger
    return factory


def _find(name: str) -> Callable[..., Any]:
    for place in _PLACES[name]:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and place.startswith(error.name):
                continue
            raise
        if hasattr(module, name):
            found: Callable[..., Any] = getattr(module, name)
            return found
    raise UnsupportedVllm(
        f"vLLM {vllm_version()} has {name} at none of {', '.join(_PLACES[name])}; install vLLM 0.26 to 0.33"
    )


def _known(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in parameters}
