"""The settings of a deployment: what is read, and what is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.deployments.app import build_app
from nestedfp.deployments.config import (
    CPU_ENVIRONMENT,
    REPLICA_ENVIRONMENT,
    DeploymentSettings,
    SimulatedArguments,
)
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.roofline import latency_model
from nestedfp.vllm.worker import refuse_unsupported

MINIMAL: dict[str, Any] = {"engine": {"model": "org/name"}}
COSTS = {"overhead_s": 0.001, "weights_s": 0.005, "token_s": 1e-5}


def test_settings_survive_the_way_to_the_replica() -> None:
    given = copy.deepcopy(MINIMAL)
    given["engine"] |= {
        "device": "cpu",
        "arguments": {"max_num_seqs": 4},
        "environment": {"A": "b"},
        "plugin": {"plans": {"mlp-fp8": ["down_proj"]}},
    }
    given["policy"] = {"controller": "static-fp8", "slo": {"ttft_s": 2.0}, "plans": ["mlp-fp8"]}
    given["autoscaling"] = {"min_replicas": 1, "max_replicas": 3}
    settings = DeploymentSettings.from_dict(given)
    assert DeploymentSettings.from_dict(settings.to_dict()) == settings
    assert settings.policy.slo.ttft_s == 2.0


def test_whole_numbers_are_kept_as_such_however_they_are_written() -> None:
    engine = {"model": "m", "device": "simulated", "arguments": {"max_num_seqs": 4.0}}
    scaled = {"min_replicas": 1.0, "max_replicas": 2.0}
    settings = DeploymentSettings.from_dict(
        {"engine": engine, "replicas": {"max_ongoing_requests": 8.0}, "autoscaling": scaled}
    )
    taken = SimulatedArguments.from_dict(settings.engine.arguments).max_num_seqs
    assert [repr(number) for number in (settings.replicas.max_ongoing_requests, taken)] == ["8", "4"]
    assert settings.autoscaling is not None
    assert repr(settings.autoscaling.scaling) == "{'min_replicas': 1, 'max_replicas': 2}"


def test_defaults() -> None:
    settings = DeploymentSettings.from_dict(MINIMAL)
    assert settings.engine.served_model_name == "name"
    assert settings.autoscaling is None
    assert settings.replicas_at_start == 1
    assert settings.environment == REPLICA_ENVIRONMENT
    assert settings.strict_wait_s == settings.policy.slo.ttft_s / 2


@pytest.mark.parametrize(
    ("device", "arguments", "held"),
    [
        ("cuda", {"max_num_seqs": 256}, 320),
        ("cpu", {"max_num_seqs": 3.0}, 4),
        ("cuda", {}, 160),
        ("cuda", {"max_num_seqs": None}, 160),
        ("simulated", {}, 320),
    ],
)
def test_a_replica_holds_somewhat_more_than_a_step(device: str, arguments: dict[str, Any], held: int) -> None:
    settings = DeploymentSettings.from_dict(
        {"engine": {"model": "m", "device": device, "arguments": arguments}}
    )
    assert settings.max_ongoing_requests == held
    assert DeploymentSettings.from_dict(settings.to_dict()) == settings
    application: Any = build_app(settings.to_dict())
    assert application._bound_deployment.max_ongoing_requests == held


def test_a_replica_that_would_hold_less_than_a_step_is_refused() -> None:
    engine = {"model": "m", "arguments": {"max_num_seqs": 64}}
    enough = DeploymentSettings.from_dict({"engine": engine, "replicas": {"max_ongoing_requests": 64}})
    assert enough.max_ongoing_requests == 64
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({"engine": engine, "replicas": {"max_ongoing_requests": 63}})
    assert (caught.value.field, caught.value.value) == ("replicas.max_ongoing_requests", 63)
    assert "at least engine.arguments.max_num_seqs, 64" in caught.value.remedy


def test_vllms_default_step_bounds_a_replica_too() -> None:
    with pytest.raises(InvalidField, match=r"max_ongoing_requests.*127.*max_num_seqs, 128"):
        DeploymentSettings.from_dict({"engine": {"model": "m"}, "replicas": {"max_ongoing_requests": 127}})


def test_cpu_replicas_get_their_environment_and_the_file_wins() -> None:
    engine = {"model": "m", "device": "cpu", "environment": {"OMP_NUM_THREADS": "4"}}
    settings = DeploymentSettings.from_dict({"engine": engine})
    assert settings.environment == {**REPLICA_ENVIRONMENT, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"engine": None}, "engine"),
        ({"engine": {}}, "engine.model"),
        ({"engine": {"model": ""}}, "engine.model"),
        ({"engine": {"model": "m", "device": "tpu"}}, "engine.device"),
        ({"engine": {"model": "m", "typo": 1}}, "engine.typo"),
        ({"engine": {"model": "m", "arguments": [1]}}, "engine.arguments"),
        ({"engine": {"model": "m", "arguments": {"model": "n"}}}, "engine.arguments.model"),
        ({"engine": {"model": "m", "arguments": {"port": 8001}}}, "engine.arguments.port"),
        (
            {"engine": {"model": "m", "arguments": {"allowed_origins": ["*"]}}},
            "engine.arguments.allowed_origins",
        ),
        ({"engine": {"model": "m", "arguments": {"hf_overrides": "{}"}}}, "engine.arguments.hf_overrides"),
        (
            {"engine": {"model": "m", "arguments": {"hf_overrides": {"quantization_config": {}}}}},
            "engine.arguments.hf_overrides",
        ),
        (
            {
                "engine": {"model": "m", "arguments": {"max_num_batched_tokens": 0}},
                "policy": {"controller": "predictive"},
            },
            "engine.arguments.max_num_batched_tokens",
        ),
        (
            {"policy": {"latency": {"chunk_tokens": 0, "costs": {"fp16": COSTS, "fp8": COSTS}}}},
            "policy.latency.chunk_tokens",
        ),
        (
            {"policy": {"latency": {"costs": {"fp16": {**COSTS, "overhead_s": -1}, "fp8": COSTS}}}},
            "policy.latency.costs.fp16.overhead_s",
        ),
        ({"policy": {"latency": {"costs": {"fp8": COSTS}}}}, "policy.latency.costs.fp16"),
        ({"engine": {"model": "m", "plugin": {"inexcat": "plain"}}}, "engine.plugin"),
        ({"engine": {"model": "m", "nested": False, "plugin": {"inexact": "plain"}}}, "engine.plugin"),
        ({"engine": {"model": "m", "device": "simulated", "plugin": {"inexact": "plain"}}}, "engine.plugin"),
        ({"policy": {"plans": ["mlp"]}}, "policy.plans"),
        ({"engine": {"model": "m", "environment": {"A": 1}}}, "engine.environment.A"),
        ({"replicas": {"count": 0}}, "replicas.count"),
        ({"replicas": {"count": True}}, "replicas.count"),
        ({"replicas": {"health_check_period_s": float("nan")}}, "replicas.health_check_period_s"),
        ({"http": {"max_body_bytes": 1}}, "http.max_body_bytes"),
        ({"policy": {"controller": "magic"}}, "policy.controller"),
        ({"policy": []}, "policy"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "autoscaling.max_replicas"),
        (
            {"replicas": {"count": 64}, "autoscaling": {"min_replicas": 1, "max_replicas": 2}},
            "replicas.count",
        ),
        ({"replica": {}}, "replica"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({**MINIMAL, **change})
    assert caught.value.field == field


def test_the_policy_predicts_with_the_engines_limit_of_tokens_in_a_step() -> None:
    engine = {"model": "m", "arguments": {"max_num_batched_tokens": 8192}}
    policy = {"controller": "predictive"}
    settings = DeploymentSettings.from_dict({"engine": engine, "policy": policy})
    assert settings.policy.latency == latency_model(8192)
    assert DeploymentSettings.from_dict(settings.to_dict()) == settings
    scaled = {"autoscaling": {"min_replicas": 1, "max_replicas": 2}}
    assert DeploymentSettings.from_dict({"engine": engine, **scaled}).policy.latency == latency_model(8192)
    assert DeploymentSettings.from_dict({"engine": engine}).policy.latency is None


@pytest.mark.parametrize(
    ("arguments", "chunk", "predicted"),
    [
        ({"max_num_batched_tokens": 8192}, {}, 8192),
        ({"max_num_batched_tokens": 8192}, {"chunk_tokens": 8192}, 8192),
        ({"max_num_batched_tokens": None}, {"chunk_tokens": 512}, 512),
        ({}, {"chunk_tokens": 512}, 512),
        ({}, {}, 2048),
    ],
)
def test_given_costs_are_of_the_engines_longest_step(
    arguments: dict[str, Any], chunk: dict[str, int], predicted: int
) -> None:
    latency = {"costs": {"fp16": COSTS, "fp8": COSTS}, **chunk}
    settings = DeploymentSettings.from_dict(
        {"engine": {"model": "m", "arguments": arguments}, "policy": {"latency": latency}}
    )
    assert settings.policy.latency is not None
    assert settings.policy.latency.chunk_tokens == predicted
    assert DeploymentSettings.from_dict(settings.to_dict()) == settings


def test_two_longest_steps_are_refused() -> None:
    latency = {"costs": {"fp16": COSTS, "fp8": COSTS}, "chunk_tokens": 2048}
    engine = {"model": "m", "arguments": {"max_num_batched_tokens": 8192}}
    with pytest.raises(InvalidField, match=r"8192 as engine\.arguments\.max_num_batched_tokens") as caught:
        DeploymentSettings.from_dict({"engine": engine, "policy": {"latency": latency}})
    assert (caught.value.field, caught.value.value) == ("policy.latency.chunk_tokens", 2048)


@pytest.mark.parametrize(
    ("engine", "given", "gpus"),
    [
        ({}, None, 1),
        ({}, 0.5, 0.5),
        ({"arguments": {"tensor_parallel_size": 4}}, None, 4),
        ({"arguments": {"tensor_parallel_size": 4}}, 4, 4),
        ({"device": "cpu"}, None, 0),
    ],
)
def test_a_replica_gets_the_gpus_that_its_engine_takes(
    engine: dict[str, Any], given: float | None, gpus: float
) -> None:
    settings = {"engine": {"model": "m", **engine}, "replicas": {"num_gpus": given}}
    assert DeploymentSettings.from_dict(settings).num_gpus == gpus


@pytest.mark.parametrize("size", ["2", True, 0, -2, 1.5, None])
def test_a_size_that_decides_over_gpus_is_a_whole_number(size: Any) -> None:
    engine = {"model": "m", "arguments": {"tensor_parallel_size": size}}
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({"engine": engine})
    assert (caught.value.field, caught.value.value) == ("engine.arguments.tensor_parallel_size", size)


def test_a_size_written_as_a_float_is_the_same_for_ray_and_for_vllm() -> None:
    engine = {"model": "m", "arguments": {"tensor_parallel_size": 2.0}}
    settings = DeploymentSettings.from_dict({"engine": engine})
    assert settings.num_gpus == 2
    assert repr(settings.engine.arguments["tensor_parallel_size"]) == "2"


@pytest.mark.parametrize(
    ("name", "value", "at_start"),
    [
        ("enable_lora", True, {"lora_config": object()}),
        ("speculative_config", {"method": "ngram"}, {"speculative_config": object()}),
        ("pipeline_parallel_size", 2, {"pipeline_parallel_size": 2}),
        ("data_parallel_size", 2, {"data_parallel_size": 2}),
    ],
)
def test_what_the_plugin_refuses_at_start_is_refused_before_it(
    name: str, value: Any, at_start: dict[str, Any]
) -> None:
    sizes = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "data_parallel_index": 0}
    parallel = {**sizes, **at_start}
    compilation = SimpleNamespace(cudagraph_mm_encoder=False)
    engine = {"lora_config": None, "speculative_config": None, "compilation_config": compilation, **at_start}
    with pytest.raises(ValueError) as started:
        refuse_unsupported(SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **engine))
    arguments = {"model": "m", "arguments": {name: value}}
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({"engine": arguments})
    assert caught.value.field == f"engine.arguments.{name}"
    assert caught.value.remedy == str(started.value)
    # Plain vLLM has them all.
    assert DeploymentSettings.from_dict({"engine": {**arguments, "nested": False}})


@pytest.mark.parametrize(("ranks", "given"), [(1, 0), (2, 1), (2, 0.5)])
def test_too_few_gpus_are_refused(ranks: int, given: float) -> None:
    engine = {"model": "m", "arguments": {"tensor_parallel_size": ranks}}
    with pytest.raises(InvalidField, match=f"give {ranks}") as caught:
        DeploymentSettings.from_dict({"engine": engine, "replicas": {"num_gpus": given}})
    assert caught.value.field == "replicas.num_gpus"
