"""The policy's status as text, made from statuses of the real actor on a clock of the test."""

from __future__ import annotations

import time
from typing import Any

import pytest

from nestedfp.deployments.policy_table import render
from nestedfp.policies.actor import PolicyActor

SETTINGS: dict[str, Any] = {
    "controller": "threshold",
    "thresholds": {"waiting": {"high": 4, "low": 1}},
    "lease_s": 5.0,
    "decide_interval_s": 0.01,
}
CALM: dict[str, Any] = {
    **dict.fromkeys(("running", "waiting", "waiting_prompt_tokens", "tokens_fp16", "tokens_fp8", "flips"), 0),
    **dict.fromkeys(("oldest_waiting_s", "kv_usage", "arrivals_per_s", "age_s"), 0.0),
    **dict.fromkeys(("ttft_p90_s", "tpot_p90_s", "step_time_s")),
}
NOON = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))


class Cluster:
    """A policy actor and what its replicas report."""

    def __init__(self, **settings: Any) -> None:
        self.now_s = 100.0
        clocks = {"clock": lambda: self.now_s, "wall": lambda: NOON + self.now_s - 100.0}
        self.actor = PolicyActor({**SETTINGS, **settings}, **clocks)
        self._sequence = 0

    async def report(self, replica: str, mode: str = "fp16", epoch: int = 0, **signals: Any) -> None:
        self._sequence += 1
        identity = {"replica_id": replica, "boot_id": replica, "sequence": self._sequence, "mode": mode}
        await self.actor.sync({**CALM, **identity, "epoch": epoch, **signals}, 0, 0.0)

    def shown(self, changes: int = 0) -> list[str]:
        return render("chat", self.actor.status(), changes).splitlines()


async def test_an_application_without_replicas() -> None:
    assert Cluster().shown(10) == [
        "chat: controller threshold; mode changes so far: 0",
        "pin: none, the controller decides",
        "",
        "no replica has reported",
    ]


async def test_a_row_for_each_replica_and_the_last_changes() -> None:
    cluster = Cluster()
    await cluster.report("a", running=12, kv_usage=0.426)
    cluster.now_s += 2.0
    await cluster.report("long-name", waiting=9, running=3)
    cluster.now_s += 0.4
    why = "waiting 9 reached high water 4"
    found = "registered in the mode it was in"
    assert cluster.shown(10) == [
        "chat: controller threshold; mode changes so far: 1",
        "pin: none, the controller decides",
        "",
        "replica    mode         since                heard     queue  running  KV   reason then",
        f"a          fp16         -                    2.4s ago  0      12       43%  {found}",
        f"long-name  fp16 -> fp8  2026-03-01 12:00:02  0.4s ago  9      3        0%   {why}",
        "",
        "last mode changes:",
        f"  2026-03-01 12:00:02  long-name  fp16 -> fp8: {why}",
    ]


async def test_a_pin_and_the_time_it_has_left() -> None:
    cluster = Cluster()
    for replica in ("a", "b"):
        await cluster.report(replica)
    await cluster.actor.set_override("fp8", 900.0)
    cluster.now_s += 1.0
    for replica in ("a", "b"):
        await cluster.report(replica, mode="fp8", epoch=2)
    shown = cluster.shown(1)
    assert shown[1] == "pin: every replica in fp8 for 14m59s more"
    assert [line.split()[:2] for line in shown[4:6]] == [["a", "fp8"], ["b", "fp8"]]
    assert shown[6:] == [
        "",
        "last mode changes:",
        "  2026-03-01 12:00:00  b  fp16 -> fp8: pinned by hand",
    ]


async def test_what_is_held_back_unusable_or_silent_is_told_under_its_row() -> None:
    cluster = Cluster()
    await cluster.report("a", waiting=float("nan"), running=2)
    row, held = cluster.shown()[4:]
    assert row.split()[5:7] == ["?", "2"]
    assert held == "  held back: unusable signals: waiting"
    cluster.now_s += 8.0
    assert cluster.shown()[-1] == "  its lease is over: it decides by itself, or is gone"


async def test_a_dry_run_says_so_and_claims_no_change() -> None:
    cluster = Cluster(dry_run=True)
    await cluster.report("a", waiting=9)
    shown = cluster.shown(5)
    assert shown[2] == "dry run: changes are decided and logged, and none is ordered"
    assert shown[5].split()[:3] == ["a", "fp16", "-"]
    assert "fp16 -> fp8 (dry run): " in shown[-1]


@pytest.mark.parametrize(("wanted", "lines"), [(0, 0), (1, 1), (2, 2), (50, 2)])
async def test_as_many_changes_as_wanted(wanted: int, lines: int) -> None:
    cluster = Cluster()
    for replica in ("a", "b"):
        await cluster.report(replica)
    await cluster.actor.set_override("fp8", 60.0)
    assert sum("fp16 -> fp8: " in line for line in cluster.shown(wanted)) == lines
