"""The images hold the versions that the project has run, and all of the package."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .manifests import BASE, K8S, OVERLAYS, Service

ROOT = K8S.parent
DOCKERFILE = (K8S / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _pinned(pattern: str) -> str:
    (found,) = set(re.findall(pattern, DOCKERFILE))
    return str(found)


def _required(extra: str, name: str) -> Requirement:
    requirements = map(Requirement, PROJECT["project"]["optional-dependencies"][extra])
    (found,) = [requirement for requirement in requirements if requirement.name == name]
    return found


def test_vllm_is_the_one_that_was_measured() -> None:
    pinned = _pinned(r"FROM vllm/vllm-openai:v(\S+)")
    measured = re.findall(
        r"\*\*Engine, every cell\*\* .*?vllm ([\d.]+)", (ROOT / "docs/measured.md").read_text()
    )
    assert set(measured) == {pinned}
    assert _required("gpu", "vllm").specifier.contains(pinned)


@pytest.mark.parametrize("pattern", [r'"ray\[serve\]==([^"]+)"', r"FROM rayproject/ray:([\d.]+)-"])
def test_ray_is_the_one_that_was_run(pattern: str) -> None:
    pinned = _pinned(pattern)
    assert set(re.findall(r"real Ray Serve ([\d.]+\d)", (ROOT / "docs/policy.md").read_text())) == {pinned}
    assert _required("serve", "ray").specifier.contains(pinned)
    assert Version(version("ray")).release[:2] == Version(pinned).release[:2]


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS])
def test_kuberay_is_told_the_version_in_the_image(folder: str) -> None:
    assert Service(folder).cluster["rayVersion"] == _pinned(r'"ray\[serve\]==([^"]+)"')


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_tag_is_the_version_of_the_package(folder: str) -> None:
    for pod in Service(folder).pods:
        assert pod.container["image"].rpartition(":")[2] == PROJECT["project"]["version"]


def test_the_build_sees_what_the_wheel_is_made_of() -> None:
    lines = (K8S / "Dockerfile.dockerignore").read_text().split()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    parts = {folder.split("/")[0] for folder in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert lines[0] == "*"
    assert let_in == parts | files
    assert all((ROOT / name).exists() for name in let_in)


def test_no_image_runs_as_root() -> None:
    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    # `runAsNonRoot` needs a number: Kubernetes does not look up a name.
    assert len(users) == len(re.findall(r"^FROM (?:rayproject|vllm)/", DOCKERFILE, re.MULTILINE))
    assert all(user.isdigit() and user != "0" for user in users)
