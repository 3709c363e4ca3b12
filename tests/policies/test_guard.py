"""What a failing controller leaves of a decision, and what is heard of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import Controller, Memory, Wish
from nestedfp.policies.guard import GuardedPolicy
from nestedfp.policies.policy import Policy
from nestedfp.policies.snapshot import Override, ReplicaView, Snapshot


class Flawed(Controller):
    """Asks for FP8, or raises the next of its errors."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.memories: list[Memory] = []

    def start(self) -> Memory:
        return "empty"

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        self.memories.append(memory)
        if self.errors:
            raise self.errors.pop()
        return {view.replica_id: Wish("fp8", "wanted") for view in snapshot.replicas}, "used"


def test_modes_and_limits_stay_pins_excepted_and_the_memory_is_emptied(
    view: Callable[..., ReplicaView],
) -> None:
    controller = Flawed()
    policy = GuardedPolicy(Policy(PolicyConfig(), controller))
    limits = {"pace_s": 0.02}
    state = Policy(PolicyConfig(), controller).start().adopt("a", "fp16", limits, 0.0, fresh=True)
    facts = Snapshot((view("a"), view("b", mode="auto")))
    controller.errors.append(ValueError("bad"))
    targets, state = policy.decide(facts, state, 0.0)
    assert {key: (target.mode, target.limits) for key, target in targets.items()} == {
        "a": ("fp16", limits),
        "b": ("auto", None),
    }
    assert {target.held for target in targets.values()} == {"the controller failed: ValueError: bad"}
    controller.errors.append(ValueError("bad"))
    pinned, state = policy.decide(Snapshot(facts.replicas, Override("fp8", 10.0)), state, 1.0)
    assert {target.mode for target in pinned.values()} == {"fp8"}
    assert pinned["a"].limits == limits
    policy.decide(facts, state, 20.0)
    assert controller.memories == ["empty"] * 3
    assert policy.status() == {"failed_decisions": 2, "last_decision_error": "ValueError: bad"}


def test_each_error_is_logged_once_with_its_traceback(
    view: Callable[..., ReplicaView], caplog: pytest.LogCaptureFixture
) -> None:
    controller = Flawed()
    plain = Policy(PolicyConfig(), controller)
    policy, state = GuardedPolicy(plain), plain.start()
    controller.errors += [KeyError("other"), *(ValueError(f"bad {number}") for number in range(5))]
    for second in range(7):
        _, state = policy.decide(Snapshot((view(),)), state, float(second))
    assert policy.status() == {"failed_decisions": 6, "last_decision_error": "KeyError: 'other'"}
    assert [record.exc_info is not None for record in caplog.records] == [True, True]


def test_a_policy_without_a_guard_raises(view: Callable[..., ReplicaView]) -> None:
    """A simulation must not go on."""
    controller = Flawed()
    controller.errors.append(ValueError("bad"))
    policy = Policy(PolicyConfig(), controller)
    with pytest.raises(ValueError, match="bad"):
        policy.decide(Snapshot((view(),)), policy.start(), 0.0)
