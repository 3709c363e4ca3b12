"""The manifests of k8s/, as files and as kustomize builds them."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
BASE = "base"
OVERLAYS = ("overlays/one-gpu", "overlays/fleet", "overlays/simulated")
Manifest = dict[str, Any]


@cache
def built(folder: str) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` would send. The base changes none of its files: they are read as they are."""
    if folder == BASE:
        names = yaml.safe_load((K8S / BASE / "kustomization.yaml").read_text())["resources"]
        texts = [(K8S / BASE / name).read_text() for name in names]
    else:
        texts = [kustomize(folder)]
    return tuple(manifest for text in texts for manifest in yaml.safe_load_all(text))


def kustomize(folder: str) -> str:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        pytest.skip("needs kustomize or kubectl")
    result = subprocess.run(
        [*command, str(K8S / folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def of_kind(folder: str, kind: str) -> Manifest | None:
    found = [manifest for manifest in built(folder) if manifest["kind"] == kind]
    assert len(found) <= 1
    return found[0] if found else None


class Service:
    """A RayService, and the parts of it that the tests ask for."""

    def __init__(self, folder: str) -> None:
        manifest = of_kind(folder, "RayService")
        assert manifest is not None
        self.manifest = manifest
        self.spec = manifest["spec"]
        self.serve: dict[str, Any] = yaml.safe_load(self.spec["serveConfigV2"])
        self.cluster = self.spec["rayClusterConfig"]
        self.head = Pod(self.cluster["headGroupSpec"])
        (group,) = self.cluster["workerGroupSpecs"]
        self.worker = Pod(group)
        self.fewest, self.now, self.most = (
            group["minReplicas"],
            group["replicas"],
            group["maxReplicas"],
        )

    @property
    def pods(self) -> tuple[Pod, Pod]:
        return self.head, self.worker


class Pod:
    """The pod of one group; its first container is Ray's."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.ray_start = group["rayStartParams"]
        self.labels = group["template"]["metadata"]["labels"]
        self.spec = group["template"]["spec"]
        self.container = self.spec["containers"][0]
        self.environment = {entry["name"]: entry for entry in self.container["env"]}
        self.ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        self.limits = self.container["resources"]["limits"]
        self.requests = self.container["resources"]["requests"]

    def value(self, name: str) -> str:
        value: str = self.environment[name]["value"]
        return value

    @property
    def secrets(self) -> dict[str, str]:
        """Name and key of the secrets that the environment takes."""
        references = [entry.get("valueFrom", {}).get("secretKeyRef") for entry in self.environment.values()]
        return {reference["name"]: reference["key"] for reference in references if reference}


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: `64Gi`, `500m`."""
    for suffix, factor in {"Gi": 2**30, "Mi": 2**20, "m": 1e-3}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
