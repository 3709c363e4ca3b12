"""What is decided where a controller fails: nothing, and everybody hears of it."""

from __future__ import annotations

import logging
import traceback
from typing import Any

from nestedfp.policies.policy import Assignment, Policy, PolicyState
from nestedfp.policies.snapshot import Snapshot

logger = logging.getLogger(__name__)


class GuardedPolicy:
    """A policy that outlives its controller's exceptions: every mode and its limits stay, pins excepted.

    An error is logged with its traceback the first time it comes from its line; all are counted. The
    controller then begins with an empty memory, so an error that came from the memory does not stay, and no
    calm from before it counts.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._failures = 0
        self._last_error: str | None = None
        self._logged: set[tuple[str, str, int | None]] = set()

    def decide(
        self, snapshot: Snapshot, state: PolicyState, now: float
    ) -> tuple[dict[str, Assignment], PolicyState]:
        """What :meth:`Policy.decide` says, or, where that raises, :meth:`Policy.hold`."""
        try:
            return self._policy.decide(snapshot, state, now)
        except Exception as error:
            self._failures += 1
            self._last_error = f"{type(error).__name__}: {error}"
            frame = traceback.extract_tb(error.__traceback__)[-1]
            origin = (type(error).__name__, frame.filename, frame.lineno)
            if origin not in self._logged:
                self._logged.add(origin)
                logger.exception("the controller failed, so every mode stays; logged once for this line")
            return self._policy.hold(snapshot, state, now, f"the controller failed: {self._last_error}")

    def status(self) -> dict[str, Any]:
        """How many decisions failed, and the error of the last that did."""
        return {"failed_decisions": self._failures, "last_decision_error": self._last_error}
