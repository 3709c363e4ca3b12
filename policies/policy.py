"""The one ``decide``: a controller's wishes under the bounds that hold for every controller.

The actor, a replica whose actor is gone, and the simulator all call :meth:`Policy.decide`. It has no clock
and no I/O; the same arguments give the same result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import Controller, Memory, Wish, by_load
from nestedfp.policies.controllers.bounds import BoundedController, step_bounds
from nestedfp.policies.controllers.predictive import PredictiveController
from nestedfp.policies.controllers.static import StaticController
from nestedfp.policies.controllers.threshold import ThresholdController
from nestedfp.policies.protocol import AUTO, FP8, FP16
from nestedfp.policies.snapshot import Override, ReplicaView, Snapshot

FLIP_WINDOW_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """What was ordered of one replica so far."""

    mode: str
    since_s: float = -math.inf
    """Time of its last mode change."""
    flips: tuple[float, ...] = ()
    """Times of its mode changes within the last 60 s."""
    reason: str = "as found"
    limits: Mapping[str, float] | None = None
    """Limits sent with the mode."""


@dataclass(frozen=True, slots=True)
class PolicyState:
    """Everything a policy remembers between decisions."""

    replicas: Mapping[str, ReplicaState] = field(default_factory=dict)
    last_return_s: float = -math.inf
    memory: Memory = None

    def without(self, replica_id: str) -> PolicyState:
        """This state with one replica forgotten."""
        rest = {key: value for key, value in self.replicas.items() if key != replica_id}
        return replace(self, replicas=rest)

    def adopt(
        self, replica_id: str, mode: str, limits: Mapping[str, float] | None, now: float, *, fresh: bool
    ) -> PolicyState:
        """This state with one replica taken over in ``mode``, sent with ``limits``.

        A ``fresh`` replica never had a target and may flip at once; any other may just have flipped under
        another owner or by itself, so its dwell time starts now, and a change of mode counts as a flip.
        """
        before = self.replicas.get(replica_id)
        flips = before.flips if before else ()
        if before is not None and before.mode != mode:
            flips = (*_recent(flips, now), now)
        adopted = ReplicaState(mode, -math.inf if fresh else now, flips, limits=limits)
        return replace(self, replicas={**self.replicas, replica_id: adopted})

    def limited(self, replica_id: str, limits: Mapping[str, float] | None) -> PolicyState:
        """This state with other limits of one replica that it knows."""
        changed = replace(self.replicas[replica_id], limits=limits)
        return replace(self, replicas={**self.replicas, replica_id: changed})


class Assignment(NamedTuple):
    """The mode of one replica from now on; ``previous`` is the one before this decision."""

    mode: str
    previous: str
    reason: str
    signal: str | None = None
    value: float | None = None
    threshold: float | None = None
    limits: Mapping[str, float] | None = None
    held: str | None = None
    """A wish that was not granted, and why; None where nothing is held back."""
    fixed: bool = False
    """The mode stays whatever the load: pinned by hand, static, or kept for strict requests."""

    @property
    def changed(self) -> bool:
        return self.mode != self.previous


class Policy:
    """A controller with the bounds of its settings."""

    def __init__(self, config: PolicyConfig, controller: Controller | None = None) -> None:
        self.config = config
        self._controller = controller or make_controller(config)

    @property
    def limits(self) -> Mapping[str, float] | None:
        """Limits that go with every mode, from the first order on; a decision may only add to them."""
        return self._controller.limits

    def start(self) -> PolicyState:
        """The state before the first decision."""
        return PolicyState(memory=self._controller.start())

    def decide(
        self, snapshot: Snapshot, state: PolicyState, now: float
    ) -> tuple[dict[str, Assignment], PolicyState]:
        """Targets for every replica of the snapshot, and the state for the next decision.

        A replica not seen before keeps the mode it reports until its signals ask for another. Replicas that
        left the snapshot are forgotten. A replica with unusable signals keeps its mode, manual pins
        excepted. A pin sets the mode alone: limits are still the controller's, or, with unusable signals, the
        last ones.
        """
        limit_s = self.config.max_signal_age_s
        views = {view.report.replica_id: view for view in by_load(snapshot.replicas)}
        known = self._known(views, state)
        faults = {key: fault for key, view in views.items() if (fault := view.fault(limit_s))}
        usable = [view for key, view in views.items() if key not in faults] if faults else views.values()
        wishes, memory = self._controller.wishes(
            replace(snapshot, replicas=tuple(usable)),
            {key: replica.mode for key, replica in known.items()},
            state.memory,
            now,
        )
        return self._grant(snapshot.override, known, wishes, faults, replace(state, memory=memory), now)

    def hold(
        self, snapshot: Snapshot, state: PolicyState, now: float, why: str
    ) -> tuple[dict[str, Assignment], PolicyState]:
        """A decision without the controller, whose memory is emptied: all stay as they are, pins excepted."""
        known = self._known({view.report.replica_id: view for view in snapshot.replicas}, state)
        emptied = replace(state, memory=self._controller.start())
        return self._grant(snapshot.override, known, {}, dict.fromkeys(known, why), emptied, now)

    def _known(self, views: Mapping[str, ReplicaView], state: PolicyState) -> dict[str, ReplicaState]:
        return {
            key: state.replicas.get(key) or ReplicaState(view.report.mode, limits=self.limits)
            for key, view in views.items()
        }

    def _grant(
        self,
        override: Override | None,
        known: Mapping[str, ReplicaState],
        wishes: Mapping[str, Wish],
        faults: Mapping[str, str],
        state: PolicyState,
        now: float,
    ) -> tuple[dict[str, Assignment], PolicyState]:
        """The wishes that may be granted now; ``faults`` says why a replica must stay as it is."""
        pin = override if override is not None and override.active(now) else None
        last_return_s = state.last_return_s
        targets: dict[str, Assignment] = {}
        after: dict[str, ReplicaState] = {}
        shared: dict[tuple[str, str, int, bool], Assignment] = {}
        for key, before in known.items():
            wish, refusal = wishes.get(key), faults.get(key)
            if pin:
                limits = before.limits if refusal is not None else wish.limits if wish is not None else None
                wish, refusal = _pin(pin, now, limits), None
            if refusal is None and wish is not None and wish.mode != before.mode and not pin:
                refusal = self._refusal(wish, before, last_return_s, now)
            if wish is None or wish.mode == before.mode or refusal is not None:
                stay = targets[key] = _stay(before, wish, refusal, shared)
                after[key] = before if stay.limits is before.limits else replace(before, limits=stay.limits)
                continue
            if _returns(wish.mode, before.mode):
                last_return_s = now
            targets[key] = _move(before, wish)
            flips = (*_recent(before.flips, now), now)
            after[key] = ReplicaState(wish.mode, now, flips, wish.reason, wish.limits)
        return targets, PolicyState(after, last_return_s, state.memory)

    def _refusal(self, wish: Wish, before: ReplicaState, last_return_s: float, now: float) -> str | None:
        """Why a wish for another mode must wait; None if it may be granted now."""
        dwell_left = before.since_s + self.config.min_dwell_s - now
        if dwell_left > 0 and not wish.urgent:
            return f"dwell time, {dwell_left:.2f} s left"
        # One at a time only to 16 bits or a plan: within auto the engine still takes FP8 where it must.
        returns = _returns(wish.mode, before.mode)
        gap_left = last_return_s + self.config.return_gap_s - now
        if returns and gap_left > 0 and not wish.urgent:
            return f"another replica returned just now, {gap_left:.2f} s left"
        # A return keeps one flip in hand, so that the next burst can still be answered within the bound.
        allowed = self.config.max_flips_per_minute - (1 if returns else 0)
        if len(_recent(before.flips, now)) >= allowed:
            return f"bound of {self.config.max_flips_per_minute} flips a minute"
        return None


def make_controller(config: PolicyConfig) -> Controller:
    """The controller that ``config.controller`` names."""
    if config.controller == "predictive":
        return BoundedController(PredictiveController(config), step_bounds(config))
    controller: Controller = ThresholdController(config)
    if config.controller.startswith("static-"):
        controller = StaticController(config.controller.removeprefix("static-"))
    return BoundedController(controller, step_bounds(config)) if config.cut_steps else controller


def _recent(flips: tuple[float, ...], now: float) -> tuple[float, ...]:
    return tuple(at for at in flips if at > now - FLIP_WINDOW_S)


def _returns(mode: str, before: str) -> bool:
    """Whether ``mode`` gives up speed for precision, for good."""
    if mode == AUTO:
        return False
    speed = {FP16: 0, FP8: 2}
    return speed.get(mode, 1) < speed.get(before, 1)


def _pin(override: Override, now: float, limits: Mapping[str, float] | None) -> Wish:
    left_s = override.until_s - now
    return Wish(override.mode, "pinned by hand", "override", left_s, 0.0, limits=limits, fixed=True)


def _move(before: ReplicaState, wish: Wish) -> Assignment:
    return Assignment(
        mode=wish.mode,
        previous=before.mode,
        reason=wish.reason,
        signal=wish.signal,
        value=wish.value,
        threshold=wish.threshold,
        limits=wish.limits,
        fixed=wish.fixed,
    )


def _stay(
    before: ReplicaState,
    wish: Wish | None,
    refusal: str | None,
    shared: dict[tuple[str, str, int, bool], Assignment],
) -> Assignment:
    """Replicas that stay for one reason with the same limits share one assignment: mostly these are all."""
    mode, reason = before.mode, before.reason
    if refusal is not None:
        held = refusal
        if wish is not None and wish.mode != mode:
            held = f"{wish.mode} ({wish.reason}): {refusal}"
        return Assignment(mode, mode, reason, None, None, None, before.limits, held)
    limits = wish.limits if wish is not None else None
    if limits == before.limits:
        limits = before.limits
    fixed = wish is not None and wish.fixed
    key = (mode, reason, id(limits), fixed)
    found = shared.get(key)
    if found is None:
        found = shared[key] = Assignment(mode, mode, reason, limits=limits, fixed=fixed)
    return found
