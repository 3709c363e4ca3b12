"""The replica's end of the protocol: which mode it must be in now, with the actor or without.

:class:`ReplicaControl` is a state machine without I/O; :func:`follow` runs it. While the lease of the last
target runs, that target holds. After it the replica is on its own: the same ``decide`` that the actor uses
runs on the replica's own report, starting from the mode it is in, until an actor answers again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.clock import SteadyClock
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.guard import GuardedPolicy
from nestedfp.policies.policy import Policy
from nestedfp.policies.protocol import FP16, ReplicaReport, Target
from nestedfp.policies.snapshot import ReplicaView, Snapshot

logger = logging.getLogger(__name__)


class ActorUnavailable(ConnectionError):
    """The policy actor did not answer: raised by the ``sync`` that is handed to :func:`follow`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One numbered call to the actor. The answer's lease counts from ``sent_s``."""

    report: ReplicaReport
    known_epoch: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class Order:
    """What the engine must follow now."""

    mode: str
    epoch: int
    reason: str
    limits: Mapping[str, float] | None = None
    source: str = "local"
    """``actor`` while a lease runs, else ``local``."""
    fixed: bool = False
    """The mode stays whatever the load."""


class ReplicaControl:
    """Holds the target, its lease and its owner, and decides alone when there is none.

    ``clock`` is monotonic; ``booted_at`` (Unix seconds, now by default) orders the boots of one replica. A
    new control starts without an owner, in ``fp16`` with epoch 0, or with the order ``found`` in force where
    it takes over an engine from another.
    """

    def __init__(
        self,
        replica_id: str,
        config: PolicyConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        boot_id: str | None = None,
        booted_at: float | None = None,
        found: Order | None = None,
    ) -> None:
        self.config = config
        self._replica_id = replica_id
        self._boot_id = boot_id or uuid.uuid4().hex
        self._booted_at = time.time() if booted_at is None else booted_at
        self._clock = SteadyClock(clock)
        self._policy = Policy(config)
        self._guarded = GuardedPolicy(self._policy)
        # Limits found are those of settings that may have changed.
        limits = None if config.dry_run else self._policy.limits
        self._order = replace(found or Order(FP16, 0, "started"), limits=limits)
        self._found_epoch = self._order.epoch
        self._state = self._policy.start().adopt(
            replica_id, self._order.mode, limits, self._clock(), fresh=found is None
        )
        self._sequence = 0
        self._last_call: Call | None = None
        self._target: Target | None = None
        self._lease_until_s = float("-inf")
        self._mode_since_s = self._clock()
        self._applied: tuple[int, float] | None = None
        self._refused_answers = 0
        self._lapses = 0

    @property
    def boot_id(self) -> str:
        return self._boot_id

    @property
    def owner(self) -> str | None:
        """Boot id of the actor whose lease runs; None while the replica is on its own."""
        return self._target.owner if self._target is not None and self._leased() else None

    @property
    def lease_left_s(self) -> float:
        """Seconds until the replica is on its own; 0 when it is."""
        return max(0.0, self._lease_until_s - self._clock())

    @property
    def mode_s(self) -> float:
        """How long the present mode has been in force, in seconds."""
        return max(0.0, self._clock() - self._mode_since_s)

    @property
    def fixed(self) -> bool:
        """Whether the present mode stays whatever the load."""
        return self._order.fixed

    def view(self) -> ReplicaView | None:
        """The newest report with the age of its signals now; None before the first."""
        call = self._last_call
        if call is None:
            return None
        return ReplicaView(call.report, call.report.age_s + self._clock() - call.sent_s)

    def applied(self, order: Order) -> None:
        """The engine has taken ``order``; the next report says so."""
        self._applied = (order.epoch, self._clock())

    def begin(self, signals: Mapping[str, Any]) -> Call:
        """Number a new call; ``signals`` are the fields of ``ReplicaReport`` that do not identify the sender.

        Signals that are missing or unusable are named in the report's faults. Any earlier call is void from
        now.
        """
        self._sequence += 1
        delivery: dict[str, Any] = {}
        if self._applied is not None:
            applied_epoch, applied_s = self._applied
            delivery = {
                "applied_epoch": applied_epoch,
                "applied_s_ago": max(0.0, self._clock() - applied_s),
            }
        epoch = self._epoch
        identity = {
            "replica_id": self._replica_id,
            "boot_id": self._boot_id,
            "booted_at": self._booted_at,
            "sequence": self._sequence,
            "mode": self._order.mode,
            "epoch": epoch,
            "owner": self._target.owner if self._target is not None else "",
        }
        report = ReplicaReport.from_dict({**signals, **delivery, **identity})
        self._last_call = Call(report, epoch if self._leased() else 0, self._clock())
        return self._last_call

    def finish(self, call: Call, answer: Mapping[str, Any]) -> bool:
        """Take the answer to ``call``; False if it must not be followed.

        Refused are answers to any call but the newest, answers whose lease is already over, epochs that
        fall, and another owner or mode under an epoch already taken. Raises :class:`InvalidField` on a
        malformed answer or an unknown mode.
        """
        target = Target.from_dict(answer)
        if target.mode not in self.config.modes:
            raise InvalidField(
                "mode", target.mode, f"order one of {', '.join(self.config.modes)}, or add the plan"
            )
        accepted = self._acceptable(call, target)
        if accepted:
            self._target = target
            self._lease_until_s = call.sent_s + target.lease_s
        else:
            self._refused_answers += 1
        return accepted

    def order(self) -> Order:
        """The mode in force from now; without a lease, what ``decide`` says of the replica's own report."""
        now = self._clock()
        target = self._target
        if target is not None and self._leased():
            order = Order(target.mode, target.epoch, target.reason, target.limits, "actor", target.fixed)
            if order.mode != self._order.mode:
                self._state = self._state.adopt(self._replica_id, order.mode, order.limits, now, fresh=False)
            elif order.limits != self._order.limits:
                self._state = self._state.limited(self._replica_id, order.limits)
        else:
            if self._order.source == "actor":
                self._lapses += 1
                logger.warning(
                    "replica %s: lease over, deciding alone from %s", self._replica_id, self._order.mode
                )
            order = self._decide_alone(now)
        if order.mode != self._order.mode:
            self._mode_since_s = now
        self._order = order
        return order

    def status(self) -> dict[str, Any]:
        """Counters and the order in force, for metrics."""
        return {
            "mode": self._order.mode,
            "epoch": self._order.epoch,
            "source": self._order.source,
            "reason": self._order.reason,
            "owner": self.owner,
            "lease_left_s": self.lease_left_s,
            "lapses": self._lapses,
            "refused_answers": self._refused_answers,
            **self._guarded.status(),
        }

    @property
    def _epoch(self) -> int:
        """Epoch of the last target accepted, here or by whoever was before."""
        return self._found_epoch if self._target is None else self._target.epoch

    def _leased(self) -> bool:
        return self._clock() < self._lease_until_s

    def _acceptable(self, call: Call, target: Target) -> bool:
        if call is not self._last_call:
            return False
        if (target.boot_id, target.sequence) != (self._boot_id, call.report.sequence):
            return False
        if self._clock() >= call.sent_s + target.lease_s:
            return False
        held = self._target
        if held is not None and target.epoch == held.epoch:
            return (target.mode, target.owner) == (held.mode, held.owner)
        return target.epoch > self._epoch

    def _decide_alone(self, now: float) -> Order:
        view = self.view()
        if view is None or self.config.dry_run:
            reason = "on its own: keeps the mode it has"
            order = self._order
            return Order(order.mode, self._epoch, reason, order.limits, fixed=self.config.dry_run)
        assignments, self._state = self._guarded.decide(Snapshot((view,)), self._state, now)
        assignment = assignments[self._replica_id]
        reason = f"on its own: {assignment.reason}"
        return Order(assignment.mode, self._epoch, reason, assignment.limits, fixed=assignment.fixed)


Sync = Callable[[dict[str, Any], int, float], Awaitable[Mapping[str, Any]]]
Signals = Callable[[], Awaitable[Mapping[str, Any]]]
Apply = Callable[[Order], Awaitable[None]]


async def follow(control: ReplicaControl, sync: Sync, signals: Signals, apply: Apply) -> None:
    """Keep a replica in the mode ordered, until cancelled.

    ``sync(report, known_epoch, wait_s)`` calls the actor (found anew each time it was lost) and raises
    :class:`ActorUnavailable` if it cannot. ``signals()`` gives the report's signals and does not raise:
    what is unknown is left out. ``apply(order)`` sets the engine's target; it is called for the first order
    and whenever mode, limits or epoch change. What ``apply`` raises ends this function: an engine that
    cannot be told is dead.
    """
    news = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_talk(control, sync, signals, news))
        tasks.create_task(_reconcile(control, apply, news))


async def _talk(control: ReplicaControl, sync: Sync, signals: Signals, news: asyncio.Event) -> None:
    wait_s = control.config.sync_wait_s
    timeout_s = wait_s + control.config.lease_s / 5
    while True:
        call = control.begin(await signals())
        try:
            # Not wait_for: before Python 3.12 it may swallow a cancellation that meets the answer.
            async with asyncio.timeout(timeout_s):
                answer = await sync(call.report.to_dict(), call.known_epoch, wait_s)
            control.finish(call, answer)
        except (ActorUnavailable, TimeoutError, InvalidField) as error:
            logger.warning("no target from the policy actor: %s", error or type(error).__name__)
            await asyncio.sleep(wait_s)
        news.set()


async def _reconcile(control: ReplicaControl, apply: Apply, news: asyncio.Event) -> None:
    applied: Order | None = None
    while True:
        order = control.order()
        if applied is None or (order.mode, order.limits, order.epoch) != (
            applied.mode,
            applied.limits,
            applied.epoch,
        ):
            await apply(order)
            control.applied(order)
            applied = order
        # Wakes at the end of the lease even if the actor never answers.
        patience_s = control.config.sync_wait_s
        if control.lease_left_s > 0:
            patience_s = min(patience_s, control.lease_left_s)
        try:
            async with asyncio.timeout(patience_s):
                await news.wait()
        except TimeoutError:
            continue
        news.clear()
