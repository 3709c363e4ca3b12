"""What operators ask of a policy actor in Ray: its status, a pin, the end of a pin.

Kept apart from `policy_actor.py`, whose source is part of the actor's name.
"""

from __future__ import annotations

from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from nestedfp.policies.checks import InvalidField

CALL_TIMEOUT_S: Final = 10.0


class PolicyCalls:
    """Calls of one actor, by its handle.

    Each raises :class:`InvalidField` where the actor refuses a value, and a :class:`RayError` where it is
    gone or does not answer in time. A pin that was not answered may be in force all the same.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def status(self) -> dict[str, Any]:
        """Targets, last reports, and `log`: mode changes with their signals."""
        status: dict[str, Any] = _answer(self._actor.status.remote())
        return status

    def pin(self, mode: str, expires_s: float) -> None:
        """Pin every replica to `mode` for `expires_s` seconds."""
        _answer(self._actor.set_override.remote(mode, expires_s))

    def unpin(self) -> None:
        """End a pin; without one nothing changes."""
        _answer(self._actor.clear_override.remote())


def why(error: RayError) -> str:
    """In a line, what became of a call."""
    if isinstance(error, GetTimeoutError):
        return f"no answer in {CALL_TIMEOUT_S:g} s"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _answer(call: Any) -> Any:
    try:
        return ray.get(call, timeout=CALL_TIMEOUT_S)
    except RayTaskError as error:
        if isinstance(error.cause, InvalidField):
            raise error.cause from None
        raise
