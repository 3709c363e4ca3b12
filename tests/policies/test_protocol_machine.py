"""The protocol under any interleaving hypothesis can find.

One replica and its successive boots talk to successive actors over a network that delays, repeats, reorders
and loses messages, and clocks jump back and forward. Old actors stay alive and go on answering what still
reaches them. What was delivered is kept by the test itself, apart from the code under test, and the
invariants are checked against it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nestedfp.policies.actor import PolicyActor, RetiredReplica
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.replica import Call, ReplicaControl

LEASE_S = 3.0
CONFIG = PolicyConfig.from_dict(
    {
        "thresholds": {"waiting": {"high": 8, "low": 1}},
        "lease_s": LEASE_S,
        "decide_interval_s": 1e-9,
        "min_dwell_s": 0.5,
        "calm_s": 0.5,
    }
)
COUNTS = ("running", "waiting_prompt_tokens", "tokens_fp16", "tokens_fp8", "flips")
TIMES = ("oldest_waiting_s", "kv_usage", "arrivals_per_s", "age_s")


@dataclass(frozen=True)
class Request:
    """A report on its way to the actor it was sent to."""

    call: Call
    message: dict[str, Any]
    actor: PolicyActor
    control: ReplicaControl
    sent_s: float


@dataclass(frozen=True)
class Reply:
    """A target on its way back."""

    call: Call
    message: dict[str, Any]
    control: ReplicaControl
    sent_s: float


class ProtocolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 100.0
        self.set_back_s = 0.0
        self.actors = 0
        self.boots = 0
        self.pinned: PolicyActor | None = None
        self.requests: list[Request] = []
        self.replies: list[Reply] = []

    def teardown(self) -> None:
        self.loop.close()

    def clock(self) -> float:
        """What both sides read; ``now`` is the truth."""
        return self.now - self.set_back_s

    @initialize()
    def begin(self) -> None:
        self.start_actor()
        self.boot_replica()

    @rule()
    def start_actor(self) -> None:
        """A new actor under the name; the one before is unreachable for new calls but not dead."""
        self.actors += 1
        self.actor = PolicyActor(CONFIG, clock=self.clock, owner=f"owner-{self.actors}")

    @rule()
    def boot_replica(self) -> None:
        self.boots += 1
        self.control = ReplicaControl(
            "a", CONFIG, clock=self.clock, boot_id=f"boot-{self.boots}", booted_at=float(self.boots)
        )
        self.delivered: list[tuple[float, dict[str, Any]]] = []
        self.orders: dict[int, tuple[str, str]] = {}
        self.highest_epoch = 0

    @rule(dt=st.one_of(st.floats(0.001, 0.4), st.sampled_from([0.5 * LEASE_S, 0.9 * LEASE_S, 2 * LEASE_S])))
    def advance(self, dt: float) -> None:
        self.now += dt

    @rule(dt=st.sampled_from([0.1, LEASE_S, 1e6]))
    def set_the_clock_back(self, dt: float) -> None:
        self.set_back_s += dt

    @rule(waiting=st.sampled_from([0, 0, 5, 9, 40]))
    def call(self, waiting: int) -> None:
        unknown = dict.fromkeys(("ttft_p90_s", "tpot_p90_s", "step_time_s"))
        signals = {**dict.fromkeys(COUNTS, 0), **dict.fromkeys(TIMES, 0.0), **unknown, "waiting": waiting}
        call = self.control.begin(signals)
        self.requests.append(Request(call, call.report.to_dict(), self.actor, self.control, self.now))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), repeat=st.booleans())
    def deliver_request(self, data: st.DataObject, repeat: bool) -> None:
        request = data.draw(st.sampled_from(self.requests))
        if not repeat:
            self.requests.remove(request)
        sync = request.actor.sync(request.message, request.call.known_epoch, 0.0)
        try:
            answer = self.loop.run_until_complete(sync)
        except RetiredReplica:
            forgotten = not request.actor.status()["replicas"]
            assert forgotten or request.control is not self.control, "the living process was refused"
            return
        self.replies.append(Reply(request.call, answer, request.control, request.sent_s))

    @precondition(lambda self: self.replies)
    @rule(data=st.data(), repeat=st.booleans())
    def deliver_reply(self, data: st.DataObject, repeat: bool) -> None:
        reply = data.draw(st.sampled_from(self.replies))
        if not repeat:
            self.replies.remove(reply)
        if reply.control is self.control:
            self.delivered.append((reply.sent_s, reply.message))
        reply.control.finish(reply.call, reply.message)

    @precondition(lambda self: self.requests or self.replies)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from([*self.requests, *self.replies]))
        (self.requests if isinstance(lost, Request) else self.replies).remove(lost)  # type: ignore[arg-type]

    @rule(mode=st.sampled_from(["fp16", "fp8"]), expires_s=st.floats(0.1, 20.0))
    def pin(self, mode: str, expires_s: float) -> None:
        self.pinned = self.actor
        self.loop.run_until_complete(self.actor.set_override(mode, expires_s))

    def exchange(self, there_s: float, back_s: float, waiting: int = 0) -> None:
        self.call(waiting)
        request = self.requests.pop()
        self.now += there_s
        sync = request.actor.sync(request.message, request.call.known_epoch, 0.0)
        answer = self.loop.run_until_complete(sync)
        self.now += back_s
        self.delivered.append((request.sent_s, answer))
        self.control.finish(request.call, answer)

    @rule(there_s=st.floats(0.0, 2.0), back_s=st.floats(0.0, 2.0))
    def slow_exchange(self, there_s: float, back_s: float) -> None:
        self.exchange(there_s, back_s)

    @rule()
    def one_undisturbed_round_gives_the_replica_its_owner(self) -> None:
        """Whatever happened before, two calls that get through give the replica to the present actor."""
        self.exchange(0.0, 0.0)
        self.exchange(0.0, 0.0)
        assert self.control.owner == f"owner-{self.actors}"

    @precondition(lambda self: self.pinned is not self.actor)
    @rule(dt=st.sampled_from([2.1, 0.9 * LEASE_S, 1.5 * LEASE_S, 1e6]))
    def set_the_clock_forward_between_calm_reports(self, dt: float) -> None:
        """Longer than signals may be old: it proves no calm, with the lease and without."""
        for waiting in (40, 40, 0):  # FP8, unless it was ordered too often.
            self.exchange(0.001, 0.0, waiting)
        mode = self.control.order().mode
        self.set_back_s -= dt
        self.exchange(0.001, 0.0)
        assert self.control.order().mode == mode

    @invariant()
    def no_target_outlives_its_lease(self) -> None:
        order = self.control.order()
        if order.source == "local":
            assert self.control.owner is None
            return
        alive = [
            message
            for sent_s, message in self.delivered
            if self.now < sent_s + LEASE_S
            and (message["epoch"], message["mode"]) == (order.epoch, order.mode)
            and message["owner"] == self.control.owner
        ]
        assert alive, f"{order} has no lease at {self.now}"

    @invariant()
    def an_epoch_has_one_owner_and_one_mode(self) -> None:
        order = self.control.order()
        if order.source == "actor":
            said = (str(self.control.owner), order.mode)
            assert self.orders.setdefault(order.epoch, said) == said
            assert order.epoch >= self.highest_epoch
            self.highest_epoch = order.epoch


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
