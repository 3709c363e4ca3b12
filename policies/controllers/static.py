"""Every replica in one mode, always."""

from __future__ import annotations

from collections.abc import Mapping

from nestedfp.policies.controllers.base import Controller, Memory, Wish
from nestedfp.policies.snapshot import Snapshot


class StaticController(Controller):
    """Keeps every replica in ``mode``."""

    def __init__(self, mode: str) -> None:
        self._wish = Wish(mode=mode, reason=f"static policy: always {mode}", urgent=True, fixed=True)

    def start(self) -> Memory:
        return None

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        return {view.replica_id: self._wish for view in snapshot.replicas}, memory
