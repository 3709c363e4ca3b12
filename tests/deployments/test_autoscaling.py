"""The scaling rule as Serve calls it: contexts in, replicas and memory out, whatever was published."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.usage import ServeUsageTag
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from nestedfp.deployments.autoscaling import JointScaling, autoscaling_config
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.policies.autoscaling import STATS, ScalingConfig, scaling_stats
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import Slo
from nestedfp.policies.protocol import ReplicaReport

IDLE = dict.fromkeys(STATS, 0.0) | {"mode_s": 10.0}
OVER = {
    "in_fp8": 1.0,
    "fixed": 0.0,
    "mode_s": 10.0,
    "strain": 2.0,
    "prompt_per_s": 30_000.0,
    "decode_per_s": 2_000.0,
    "prompt_tokens": 1000.0,
    "context": 800.0,
}
SETTINGS = {
    "engine": {"model": "org/name"},
    "autoscaling": {"min_replicas": 1, "max_replicas": 4, "rule": {"overload_s": 2.0, "spare_s": 10.0}},
}


class Serve:
    """What Serve's controller does with the policy: it keeps its state and its target."""

    def __init__(self, target: int) -> None:
        self.config: AutoscalingConfig = autoscaling_config(DeploymentSettings.from_dict(SETTINGS))
        made = self.config.policy.get_policy()
        self.policy = _apply_autoscaling_config(made(**self.config.policy.policy_kwargs))
        self.target = target
        self.state: dict[str, Any] = {}

    def tick(self, now: float, rows: list[dict[str, float]], *, published_at: float | None = None) -> int:
        """One decision at `now`; replica i has published `rows[i]`."""
        ids = [ReplicaID(f"r{number}", DeploymentID("d", "a")) for number in range(len(rows))]
        at = now if published_at is None else published_at
        metrics: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for replica, row in zip(ids, rows, strict=True):
            for name, value in row.items():
                metrics.setdefault(name, {})[replica] = [TimeStampedValue(at, value)]
        context = AutoscalingContext(
            deployment_id=DeploymentID("d", "a"),
            deployment_name="d",
            app_name="a",
            current_num_replicas=len(rows),
            target_num_replicas=self.target,
            running_replicas=ids,
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics=metrics,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=4,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self.config,
        )
        self.target, self.state = self.policy(context)
        assert isinstance(self.target, int)
        return self.target


def test_lasting_overload_adds_and_lasting_calm_removes() -> None:
    serve = Serve(target=1)
    assert serve.tick(100.0, [OVER]) == 1
    assert serve.tick(101.9, [OVER]) == 1
    grown = serve.tick(102.0, [OVER])
    assert grown > 1
    assert serve.tick(102.1, [OVER]) == grown
    assert serve.tick(103.0, [IDLE] * grown) == grown
    assert serve.tick(112.9, [IDLE] * grown) == grown
    assert serve.tick(113.0, [IDLE] * grown) == grown - 1


def test_nothing_changes_while_a_replica_starts() -> None:
    serve = Serve(target=2)
    for now in range(100, 200):
        assert serve.tick(float(now), [OVER]) == 2


def test_a_silent_replica_is_never_taken_for_an_idle_one() -> None:
    serve = Serve(target=2)
    for now in range(100, 200):
        assert serve.tick(float(now), [IDLE, {}]) == 2


def test_a_replica_that_is_never_scheduled_is_waited_for_no_longer_than_the_patience() -> None:
    serve = Serve(target=2)
    patience_s = ScalingConfig().start_patience_s
    assert {serve.tick(100.0 + second, [OVER]) for second in range(int(patience_s))} == {2}
    assert serve.tick(100.0 + patience_s, [OVER]) > 2


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_replicas_whose_clock_is_off_are_counted_all_the_same(ahead_s: float) -> None:
    serve = Serve(target=1)
    for now in (100.0, 101.0):
        assert serve.tick(now, [OVER], published_at=now + ahead_s) == 1
    assert serve.tick(102.0, [OVER], published_at=102.0 + ahead_s) > 1


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -3600.0])
def test_facts_that_come_no_more_change_nothing(ahead_s: float) -> None:
    serve = Serve(target=2)
    for now in range(100, 130):
        assert serve.tick(float(now), [IDLE, IDLE], published_at=100.0 + ahead_s) == 2
        assert (serve.state["reason"] == "no usable reports") == (now > 105)


def test_a_clock_set_back_keeps_no_silent_replica_fresh() -> None:
    serve = Serve(target=2)
    serve.tick(1000.0, [IDLE, IDLE], published_at=1000.0)
    for now in range(500, 506):
        serve.tick(float(now), [IDLE, IDLE], published_at=1000.0)
        assert serve.state["reason"] != "no usable reports"
    serve.tick(506.0, [IDLE, IDLE], published_at=1000.0)
    assert serve.state["reason"] == "no usable reports"


def test_each_change_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    serve = Serve(target=1)
    for now in range(100, 104):
        serve.tick(float(now), [OVER])
    assert [record.message for record in caplog.records if record.name == "ray.serve"] == [
        f"a/d: replicas wanted: 1 -> {serve.target}, FP8 too slow on 1 replicas"
    ]


def test_silence_is_told_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    def told() -> int:
        return sum("no usable reports" in record.message for record in caplog.records)

    serve = Serve(target=2)
    for now in range(100, 120):
        serve.tick(float(now), [])
    assert told() == 0, "replicas that start have nothing to say"
    for now in range(120, 140):
        serve.tick(float(now), [{}, {}])
        assert told() == (now > 125)
    serve.tick(140.0, [IDLE, IDLE])
    for now in range(141, 160):
        serve.tick(float(now), [IDLE, IDLE], published_at=140.0)
    assert told() == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_unusable_numbers_change_nothing(value: float) -> None:
    serve = Serve(target=2)
    for now in range(100, 130):
        assert serve.tick(float(now), [{**OVER, "strain": value}] * 2) == 2


def test_a_clock_set_back_starts_the_delays_again() -> None:
    serve = Serve(target=1)
    serve.tick(1000.0, [OVER])
    assert serve.tick(500.0, [OVER]) == 1
    assert serve.tick(501.9, [OVER]) == 1
    assert serve.tick(502.0, [OVER]) > 1


def test_the_policy_reads_what_a_replica_publishes() -> None:
    signals = dict.fromkeys(("running", "waiting", "waiting_prompt_tokens", "flips"), 0)
    report = ReplicaReport.from_dict(
        {
            **signals,
            "replica_id": "r",
            "boot_id": "b",
            "sequence": 1,
            "mode": "fp8",
            "epoch": 1,
            "oldest_waiting_s": 4.0,
            "kv_usage": 0.5,
            "arrivals_per_s": 30.0,
            "ttft_p90_s": None,
            "tpot_p90_s": None,
            "step_time_s": None,
            "tokens_fp16": 0,
            "tokens_fp8": 10,
            "age_s": 0.0,
            "arriving_prompt_tokens_per_s": 30_000.0,
        }
    )
    published = scaling_stats(report, 5.0, Slo())
    serve = Serve(target=1)
    serve.tick(100.0, [published])
    assert serve.tick(102.0, [published]) > 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling.max_replicas"),
        ({"autoscaling": {"min_replicas": 0, "max_replicas": 2}}, "autoscaling.min_replicas"),
        ({"autoscaling": {"max_replicas": 2}}, "autoscaling.min_replicas"),
        ({"autoscaling": {**SETTINGS["autoscaling"], "interval_s": 0}}, "autoscaling.interval_s"),
        ({"autoscaling": {**SETTINGS["autoscaling"], "upscale_delay_s": 3}}, "autoscaling.upscale_delay_s"),
        (
            {"autoscaling": {**SETTINGS["autoscaling"], "rule": {"overload_s": -1}}},
            "autoscaling.rule.overload_s",
        ),
        ({"autoscaling": {**SETTINGS["autoscaling"], "rule": {"delay": 1}}}, "autoscaling.rule.delay"),
        ({"engine": {"model": "m", "nested": False}}, "autoscaling"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({**SETTINGS, **change})
    assert caught.value.field == field


def test_serve_gets_the_bounds_and_adds_no_delay_of_its_own() -> None:
    config = autoscaling_config(DeploymentSettings.from_dict(SETTINGS))
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
    assert config.policy.policy_function.endswith("JointScaling")
    assert isinstance(JointScaling(**config.policy.policy_kwargs), JointScaling)


def test_a_deployment_starts_with_the_fewest_and_a_changed_one_keeps_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ServeUsageTag, "record", lambda *_: None)
    scaled = {"min_replicas": 2, "max_replicas": 8}
    config = autoscaling_config(DeploymentSettings.from_dict({**SETTINGS, "autoscaling": scaled}))

    def deployed(version: str, user_config: dict[str, Any] | None = None) -> DeploymentInfo:
        return DeploymentInfo(
            deployment_config=DeploymentConfig(autoscaling_config=config, user_config=user_config),
            replica_config=ReplicaConfig.create(object, ray_actor_options={}),
            start_time_ms=0,
            deployer_job_id="",
            version=version,
        )

    state = DeploymentAutoscalingState(DeploymentID("d", "a"))
    assert state.register(deployed("1"), curr_target_num_replicas=0) == 2
    assert state.register(deployed("1", {"policy": {}}), curr_target_num_replicas=7) == 7
    assert state.register(deployed("2"), curr_target_num_replicas=6) == 6
