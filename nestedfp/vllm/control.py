"""The door to an engine's precision from the process that owns its `AsyncLLM`."""

from typing import Any, Protocol

from nestedfp.vllm.status import EngineStatus

UTILITY = "nestedfp_control"
"""The method that `nestedfp.vllm.register` adds to vLLM's `EngineCore`."""

STRICT_CACHE_SALT = "nestedfp-fp16"
"""`cache_salt` of strict requests, alone or before `:` and a salt of the client's own: keeps them from
reusing KV blocks that were computed in FP8. A request that has it is strict, whatever its arguments say."""

PRECISION_ARGUMENT = "nestedfp_precision"
"""Key in `SamplingParams.extra_args` (`vllm_xargs` in the OpenAI API): `fp16` pins a request to 16 bits."""


class _EngineCore(Protocol):
    async def call_utility_async(self, method: str, *args: Any) -> Any: ...


class _Engine(Protocol):
    @property
    def engine_core(self) -> _EngineCore: ...


class EngineControl:
    """Sets the target and reads the state of `engine`, an `AsyncLLM` started with `engine_arguments`.

    Calls are answered between steps and drain nothing. A target is in force from the first step that is
    scheduled after `set_target` returned. Setting the same target again, with the same limits, changes
    nothing, a lost call leaves the old target in force, and a dead engine raises vLLM's `EngineDeadError`.
    """

    def __init__(self, engine: _Engine) -> None:
        self._core = engine.engine_core

    async def set_target(
        self, mode: str, *, epoch: int = 0, reason: str = "", limits: dict[str, float] | None = None
    ) -> None:
        """Sets the target to `fp16`, `fp8`, `auto` or a plan named in the configuration.

        `limits` overrides the configured ones by name (see `nestedfp.vllm.choice.Limits`) until the next
        target; without it those are in force. Raises ValueError for an unknown mode or limit, and for an
        epoch older than the one in force.
        """
        await self._call("set_target", mode=mode, epoch=epoch, reason=reason, limits=limits)

    async def status(self) -> EngineStatus:
        return EngineStatus.from_dict(await self._call("status"))

    async def take_request_tokens(self, request_id: str) -> dict[str, int] | None:
        """Executed tokens of a request by plan, e.g. {"fp16": 40, "fp8": 12}; None if it is not known.

        `request_id` is the id that the OpenAI response shows; the entries of all its prompts and samples
        are added up and removed. The engine keeps a bounded number of entries.
        """
        tokens: dict[str, int] | None = await self._call("take_request_tokens", request_id=request_id)
        return tokens

    async def _call(self, command: str, **arguments: Any) -> Any:
        # vLLM turns an exception inside a utility into a bare Exception that holds only its text, so
        # a refused command comes back as a value.
        answer = await self._core.call_utility_async(UTILITY, {"command": command, **arguments})
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]
