"""The utility call that sets the target and reads the state inside the engine process."""

from typing import Any

from nestedfp.vllm.control import UTILITY

_FACTS = "_nestedfp_worker_facts"


def nestedfp_control(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Runs one command between two steps; added to vLLM's `EngineCore` as a method.

    Answers {"result": ...}, or {"error": text} for a command that was refused.
    """
    arguments = dict(request)
    command = arguments.pop("command", None)
    scheduler = engine.scheduler
    if not hasattr(scheduler, "selection"):
        return {
            "error": f"the engine's scheduler is {type(scheduler).__name__}, which takes no precision "
            "target; start it with nestedfp.vllm.engine_arguments()"
        }
    try:
        if command == "set_target":
            return {"result": scheduler.selection.set_target(**arguments)}
        if command == "take_request_tokens":
            return {"result": scheduler.request_tokens.take(arguments["request_id"])}
        if command == "status":
            facts = _worker_facts(engine, scheduler.counts.loads)
            return {"result": scheduler.precision_status(facts).to_dict()}
    except ValueError as error:
        return {"error": str(error)}
    return {"error": f"unknown command {command!r}, expected set_target, status or take_request_tokens"}


def _worker_facts(engine: Any, loads: int) -> dict[str, Any]:
    """Facts that change with the weights alone, asked of the first rank once a load.

    The call waits for the step in progress. `loads` is what the last executed step said: a reload shows from
    the first step after it.
    """
    known: tuple[int, dict[str, Any]] | None = getattr(engine, _FACTS, None)
    if known is None or known[0] < loads:
        facts = dict(engine.collective_rpc("precision_facts")[0])
        known = facts.pop("loads"), facts
        setattr(engine, _FACTS, known)
    return known[1]


def install(engine_core: Any) -> None:
    """Adds the utility to the class `engine_core`; vLLM looks utilities up as methods."""
    setattr(engine_core, UTILITY, nestedfp_control)
