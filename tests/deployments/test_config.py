"""The settings file: what is read, what is refused, and that the shipped files are good."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from nestedfp.deployments.config import CPU_ENVIRONMENT, DeploymentSettings, ServeFile
from nestedfp.deployments.serve import with_overrides
from nestedfp.policies.checks import InvalidField

CONFIGS = sorted((Path(str(files("nestedfp.deployments"))) / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"engine": {"model": "org/name"}}
APPLICATION = {"name": "app", "import_path": "nestedfp.deployments.app:build_app", "args": MINIMAL}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_are_good_for_both_commands(path: Path) -> None:
    file = ServeFile.load(path)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications[0].name == file.app_name
    assert DeploymentSettings.from_dict(schema.applications[0].args) == file.settings


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


def test_defaults() -> None:
    settings = DeploymentSettings.from_dict(MINIMAL)
    assert settings.engine.served_model_name == "name"
    assert settings.autoscaling is None
    assert settings.environment == {}


def test_cpu_replicas_get_their_environment_and_the_file_wins() -> None:
    engine = {"model": "m", "device": "cpu", "environment": {"OMP_NUM_THREADS": "4"}}
    settings = DeploymentSettings.from_dict({"engine": engine})
    assert settings.environment == {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": "4"}


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
        ({"engine": {"model": "m", "arguments": {"hf_overrides": "{}"}}}, "engine.arguments.hf_overrides"),
        (
            {"engine": {"model": "m", "arguments": {"hf_overrides": {"quantization_config": {}}}}},
            "engine.arguments.hf_overrides",
        ),
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
        ({"replica": {}}, "replica"),
    ],
)
def test_a_bad_setting_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        DeploymentSettings.from_dict({**MINIMAL, **change})
    assert caught.value.field == field


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


@pytest.mark.parametrize(("ranks", "given"), [(1, 0), (2, 1), (2, 0.5)])
def test_too_few_gpus_are_refused(ranks: int, given: float) -> None:
    engine = {"model": "m", "arguments": {"tensor_parallel_size": ranks}}
    with pytest.raises(InvalidField, match=f"give {ranks}") as caught:
        DeploymentSettings.from_dict({"engine": engine, "replicas": {"num_gpus": given}})
    assert caught.value.field == "replicas.num_gpus"


def serve_file(**changes: Any) -> dict[str, Any]:
    return {"http_options": {"port": 8123}, "applications": [APPLICATION], **changes}


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("text", "file"),
        (serve_file(applications=[]), "applications"),
        (serve_file(applications=[{"import_path": "other:app"}]), "applications[0].import_path"),
        (serve_file(http_options={"port": "http"}), "http_options.port"),
        (serve_file(http_options={"port": 70000}), "http_options.port"),
        (serve_file(http_options={"root_path": "/a"}), "http_options.root_path"),
        (serve_file(http_options=7), "http_options"),
        (serve_file(logging_config={}), "logging_config"),
        (serve_file(applications=["nestedfp"]), "applications[0]"),
        (serve_file(applications=[{**APPLICATION, "deployments": []}]), "applications[0].deployments"),
        (serve_file(applications=[{**APPLICATION, "route_prefix": "llm"}]), "applications[0].route_prefix"),
    ],
)
def test_a_bad_file_is_explained(content: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        ServeFile.from_dict(content)
    assert caught.value.field == field


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("a: [")
    with pytest.raises(InvalidField, match=r"serve\.yaml"):
        ServeFile.load(path)


@pytest.mark.parametrize(
    ("host", "prefix", "url"),
    [
        ("127.0.0.1", "/", "http://127.0.0.1:8123/v1"),
        ("0.0.0.0", "/llm", "http://127.0.0.1:8123/llm/v1"),
    ],
)
def test_url(host: str, prefix: str, url: str) -> None:
    content = serve_file(http_options={"host": host, "port": 8123})
    content["applications"][0] = {**content["applications"][0], "route_prefix": prefix}
    assert ServeFile.from_dict(content).url == url


def test_command_line_overrides() -> None:
    file = ServeFile.from_dict(serve_file())
    changed = with_overrides(file, model="/models/other", port=9000, replicas=5)
    assert changed.settings.engine.model == "/models/other"
    assert changed.settings.engine.served_model_name == "other"
    assert changed.settings.replicas.count == 5
    assert changed.port == 9000
    assert with_overrides(file) == file


def test_an_override_that_cannot_be_used_is_named() -> None:
    with pytest.raises(InvalidField, match=r"http_options\.port: got 70000"):
        with_overrides(ServeFile.from_dict(serve_file()), port=70000)
    scaled = {**MINIMAL, "autoscaling": {"min_replicas": 1, "max_replicas": 3}}
    file = ServeFile.from_dict(serve_file(applications=[{**APPLICATION, "args": scaled}]))
    with pytest.raises(InvalidField, match="--replicas: got 2"):
        with_overrides(file, replicas=2)
