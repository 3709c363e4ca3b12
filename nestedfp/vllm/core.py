"""The utility call that sets the target and reads the state inside the engine process."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nestedfp.vllm.control import UTILITY
from nestedfp.vllm.status import EngineStatus

_FACTS = "_nestedfp_worker_facts"
_ARGUMENTS: dict[str, tuple[set[str], set[str]]] = {
    "set_target": ({"mode", "epoch"}, {"reason", "limits"}),
    "take_request_tokens": ({"request_id"}, set()),
    "status": (set(), set()),
}
"""By command, the arguments that it needs and those that it may have."""


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
        _check_arguments(command, arguments)
        if command == "set_target":
            return {"result": scheduler.selection.set_target(**arguments)}
        if command == "take_request_tokens":
            return {"result": scheduler.request_tokens.take(arguments["request_id"])}
        return {"result": _status(engine).to_dict()}
    except ValueError as error:
        return {"error": str(error)}


def _check_arguments(command: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown command, and for arguments that it lacks or does not take."""
    if not isinstance(command, str) or command not in _ARGUMENTS:
        raise ValueError(f"unknown command {command!r}, expected one of {list(_ARGUMENTS)}")
    needed, optional = _ARGUMENTS[command]
    missing, unknown = needed - arguments.keys(), arguments.keys() - needed - optional
    if missing or unknown:
        raise ValueError(
            f"{command}: missing {sorted(missing)}, unknown {sorted(unknown)}; the engine and its caller run "
            "different versions of nestedfp"
        )


def _status(engine: Any) -> EngineStatus:
    facts, ranks = _worker_facts(engine, engine.scheduler.counts.loads)
    status: EngineStatus = engine.scheduler.precision_status(facts)
    if status.mixed_steps is None or ranks == 1:
        return status
    # The first rank's came with the steps' outputs.
    others = engine.collective_rpc("checked_steps")[1:]
    return replace(status, mixed_steps=sum((rank["mixed"] for rank in others), status.mixed_steps))


def _worker_facts(engine: Any, loads: int) -> tuple[dict[str, Any], int]:
    """Facts that change with the weights alone, asked of the workers once a load, and the number of ranks.

    Rows that are rounded are added up over the ranks; the rest is the first rank's, as all nest the same
    layers. The call waits for the step in progress. `loads` is what the last executed step said: a reload
    shows from the first step after it.
    """
    known: tuple[int, dict[str, Any], int] | None = getattr(engine, _FACTS, None)
    if known is None or known[0] < loads:
        ranks: list[dict[str, Any]] = engine.collective_rpc("precision_facts")
        facts = {**ranks[0], "inexact_rows": sum(rank["inexact_rows"] for rank in ranks)}
        known = facts.pop("loads"), facts, len(ranks)
        setattr(engine, _FACTS, known)
    return known[1:]


def install(engine_core: Any) -> None:
    """Adds the utility to the class `engine_core`; vLLM looks utilities up as methods."""
    setattr(engine_core, UTILITY, nestedfp_control)
