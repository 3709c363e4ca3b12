"""The file around the settings: what is read, what is refused, and that the shipped files are good."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.serve import with_overrides
from nestedfp.deployments.serve_file import IMPORT_PATH, PROXY_LOCATIONS, ServeFile
from nestedfp.policies.checks import InvalidField

CONFIGS = sorted((Path(str(files("nestedfp.deployments"))) / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {"engine": {"model": "org/name"}}
APPLICATION = {"name": "app", "import_path": IMPORT_PATH, "args": MINIMAL}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_are_good_for_both_commands(path: Path) -> None:
    file = ServeFile.load(path)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications[0].name == file.app_name
    assert DeploymentSettings.from_dict(schema.applications[0].args) == file.settings


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
        (serve_file(proxy_location="Nowhere"), "proxy_location"),
        (serve_file(proxy_location="Disabled"), "proxy_location"),
        (serve_file(applications=["nestedfp"]), "applications[0]"),
        (serve_file(applications=[{**APPLICATION, "deployments": []}]), "applications[0].deployments"),
        (serve_file(applications=[{**APPLICATION, "route_prefix": "llm"}]), "applications[0].route_prefix"),
    ],
)
def test_a_bad_file_is_explained(content: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        ServeFile.from_dict(content)
    assert caught.value.field == field


def test_the_places_of_proxies_are_rays() -> None:
    assert {*PROXY_LOCATIONS, "Disabled"} == {place.value for place in ProxyLocation}


def test_a_replica_that_must_go_has_time_for_every_answer() -> None:
    assert ServeFile.from_dict(serve_file()).settings.replicas.graceful_shutdown_timeout_s == 600.0
    args = {**MINIMAL, "replicas": {"graceful_shutdown_timeout_s": 120}}
    application = {**APPLICATION, "args": args}
    with pytest.raises(
        InvalidField, match=r"replicas\.graceful_shutdown_timeout_s: got 120; .*request_timeout_s, 600:"
    ):
        ServeFile.from_dict(serve_file(applications=[application]))
    shorter = serve_file(applications=[application], http_options={"request_timeout_s": 120})
    assert ServeFile.from_dict(shorter).request_timeout_s == 120


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
