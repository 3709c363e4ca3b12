"""What Serve calls on a replica, with neither Serve nor an engine."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.replica import UserCallableWrapper

from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.replica import EngineReplica, with_user_config
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.roofline import NAME

SETTINGS = DeploymentSettings.from_dict({"engine": {"model": "m"}, "policy": {"slo": {"ttft_s": 2.0}}})
BAD = {"policy": {"controler": "predictive"}}


class Engine:
    """Remembers the SLO that it was told."""

    def __init__(self) -> None:
        self.ttft_s = SETTINGS.policy.slo.ttft_s
        self.adopted = 0
        self.silent_s = 0.0
        self.asked = 0

    async def refresh(self) -> bool:
        self.asked += 1
        return True

    def adopt(self, settings: DeploymentSettings) -> None:
        self.ttft_s = settings.policy.slo.ttft_s
        self.adopted += 1


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def replica(engine: Engine) -> Any:
    """A replica of plain vLLM, which follows no policy, before Serve has found it healthy."""
    kind: Any = EngineReplica

    class Replica(kind.func_or_class):  # type: ignore[misc]
        def __del__(self) -> None:
            """Serve awaits the real one; here the garbage collector calls it."""

    made: Any = object.__new__(Replica)
    plain = {**SETTINGS.to_dict(), "engine": {"model": "m", "nested": False}}
    made._given = made._settings = DeploymentSettings.from_dict(plain)
    made._engine, made._loop, made._following, made._death_watch = engine, None, None, None
    made._healthy = False
    made._latency_told = ""
    return made


async def test_a_changed_policy_reaches_the_engine(replica: Any, engine: Engine) -> None:
    await replica.reconfigure({"policy": {"slo": {"ttft_s": 0.5}}})
    assert engine.ttft_s == 0.5


@pytest.fixture
def serve(replica: Any) -> Any:
    """Ray's own part of a replica, around this one."""
    wrapper: Any = object.__new__(UserCallableWrapper)
    wrapper._callable, wrapper._is_function = replica, False
    wrapper._run_user_code_in_separate_thread = wrapper._run_sync_methods_in_threadpool = False
    return wrapper


@pytest.mark.parametrize("removed", [None, {}])
async def test_without_user_config_the_settings_of_the_file_hold_again(
    serve: Any, engine: Engine, removed: dict[str, Any] | None
) -> None:
    await serve.call_reconfigure({"policy": {"slo": {"ttft_s": 0.5}}}, rank=0)
    await serve.call_reconfigure(removed, rank=0)
    assert engine.ttft_s == 2.0


async def test_what_changes_nothing_leaves_the_replica_alone(serve: Any, engine: Engine) -> None:
    await serve.call_reconfigure(None, rank=0)
    for rank in (0, 1):
        await serve.call_reconfigure({"policy": {"slo": {"ttft_s": 0.5}}}, rank=rank)
    assert engine.adopted == 1


async def test_a_bad_user_config_fails_a_start_but_ends_no_replica_that_serves(
    replica: Any, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidField, match="controler"):
        await replica.reconfigure(BAD)
    await replica.check_health()
    with caplog.at_level("ERROR", logger="ray.serve"):
        await replica.reconfigure(BAD)
    assert "controler" in caplog.text
    assert engine.ttft_s == 2.0
    assert replica._settings.policy == SETTINGS.policy


async def test_the_latency_model_is_told_once(replica: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ray.serve"):
        for model in (NAME, NAME, "policy.latency"):
            replica._tell_latency_model(model)
    assert [record.getMessage() for record in caplog.records] == [
        f"step costs at first: {model}, corrected online by this engine's steps"
        for model in (NAME, "policy.latency")
    ]


@pytest.mark.parametrize(
    ("device", "controller", "level"),
    [("cuda", "predictive", "WARNING"), ("cuda", "threshold", "INFO"), ("cpu", "predictive", "INFO")],
)
async def test_costs_that_nobody_gave_for_a_gpu_are_warned_of_where_anything_predicts_with_them(
    replica: Any, caplog: pytest.LogCaptureFixture, device: str, controller: str, level: str
) -> None:
    replica._settings = DeploymentSettings.from_dict(
        {"engine": {"model": "m", "device": device}, "policy": {"controller": controller}}
    )
    with caplog.at_level("INFO", logger="ray.serve"):
        replica._tell_latency_model(NAME)
    assert [record.levelname for record in caplog.records] == [level]
    assert ("give policy.latency" in caplog.text) == (level == "WARNING")


async def test_an_engine_that_hangs_is_not_healthy(replica: Any, engine: Engine) -> None:
    engine.silent_s = 100.0
    await replica.check_health()
    engine.silent_s = 130.0
    with pytest.raises(RuntimeError, match="not answered for 130 s"):
        await replica.check_health()


@pytest.mark.parametrize("nested", [False, True])
async def test_the_health_check_asks_the_engine_where_no_control_loop_does(
    replica: Any, engine: Engine, nested: bool
) -> None:
    replica._settings = DeploymentSettings.from_dict(
        {**SETTINGS.to_dict(), "engine": {"model": "m", "nested": nested}}
    )
    await replica.check_health()
    assert engine.asked == (0 if nested else 1)


def test_user_config_changes_the_policy_alone() -> None:
    changed = with_user_config(SETTINGS, {"policy": {"slo": {"ttft_s": 1.0}}})
    assert changed.policy.slo.ttft_s == 1.0
    assert changed.strict_wait_s == 0.5
    assert changed.engine == SETTINGS.engine
    assert with_user_config(SETTINGS, {}) == SETTINGS


@pytest.mark.parametrize(
    ("user_config", "field"),
    [
        ({"polcy": {}}, "user_config.polcy"),
        ({"engine": {"model": "other"}}, "user_config.engine"),
        ({"policy": {"slo": {"ttft_s": -1}}}, "policy.slo.ttft_s"),
    ],
)
def test_a_bad_user_config_is_named(user_config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        with_user_config(SETTINGS, user_config)
    assert caught.value.field == field
