"""The manifests agree with KubeRay's schema, with the shipped Serve files, with Ray, and with each other."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from nestedfp.deployments import front_door
from nestedfp.deployments.serve_file import ServeFile

from .manifests import BASE, K8S, OVERLAYS, Pod, Service, built, of_kind, quantity

CONFIGS = K8S.parent / "deployments" / "configs"
FOLDERS = (BASE, *OVERLAYS)
CLUSTER = {"proxy_location": "EveryNode", "http_options.host": "0.0.0.0"}
COUNT = "applications.0.args.replicas.count"
AUTOSCALING = "applications.0.args.autoscaling"
GONE = object()
DIFFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("gpu.yaml", {**CLUSTER, COUNT: 1}),
    "overlays/one-gpu": ("gpu.yaml", {**CLUSTER, COUNT: 1}),
    "overlays/fleet": (
        "gpu.yaml",
        {**CLUSTER, COUNT: GONE, f"{AUTOSCALING}.min_replicas": 2, f"{AUTOSCALING}.max_replicas": 8},
    ),
    "overlays/simulated": ("simulated.yaml", {**CLUSTER, COUNT: 2}),
}
README = (K8S / "README.md").read_text()


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(folder: str) -> Service:
    return Service(folder)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """KubeRay's schema of a RayService, in which an unknown field is an error."""
    if "NESTEDFP_CRDS" not in os.environ:
        pytest.skip("needs NESTEDFP_CRDS, a folder with KubeRay's ray.io_rayservices.yaml")
    crd = yaml.safe_load((Path(os.environ["NESTEDFP_CRDS"]) / "ray.io_rayservices.yaml").read_text())
    (version,) = [entry for entry in crd["spec"]["versions"] if entry["name"] == "v1"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    _close(found)
    return found


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for entry in schema:
            _close(entry)
    if isinstance(schema, dict):
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields", False)
        if isinstance(schema.get("properties"), dict) and not open_ended:
            schema.setdefault("additionalProperties", False)
        for entry in schema.values():
            _close(entry)


def flat(value: Any, place: str = "") -> dict[str, Any]:
    """Dotted name -> value, of every leaf of a mapping."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {place: value}
    leaves: dict[str, Any] = {}
    for key, entry in value.items():
        leaves |= flat(entry, f"{place}.{key}" if place else str(key))
    return leaves


def test_the_service_is_what_kuberay_takes(service: Service, schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(schema).validate(service.manifest)


def test_the_schema_finds_a_mistyped_field(schema: dict[str, Any]) -> None:
    manifest = copy.deepcopy(Service(BASE).manifest)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.Draft202012Validator(schema).validate(manifest)


def test_the_application_is_accepted_here_and_by_ray(service: Service) -> None:
    file = ServeFile.from_dict(service.serve)
    deployed = ServeDeploySchema.model_validate(service.serve)
    assert deployed.applications[0].name == file.app_name


def test_the_application_is_the_shipped_one_but_for_what_a_cluster_changes(
    folder: str, service: Service
) -> None:
    source, differences = DIFFERENCES[folder]
    expected = flat(yaml.safe_load((CONFIGS / source).read_text())) | differences
    assert flat(service.serve) == {name: value for name, value in expected.items() if value is not GONE}


def test_an_answer_has_the_time_it_may_take_when_its_pod_must_go(service: Service) -> None:
    file = ServeFile.from_dict(service.serve)
    answers_s = file.settings.replicas.graceful_shutdown_timeout_s
    drain_s = float(service.worker.value("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"))
    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    killed_s = service.worker.spec["terminationGracePeriodSeconds"]
    assert file.request_timeout_s <= answers_s < drain_s < killed_s
    assert file.request_timeout_s < service.spec["rayClusterDeletionDelaySeconds"]


def test_each_replica_finds_a_place_and_no_place_is_idle(service: Service) -> None:
    settings = ServeFile.from_dict(service.serve).settings
    fewest = most = settings.replicas_at_start
    if settings.autoscaling is not None:
        most = settings.autoscaling.max_replicas
    assert service.fewest <= service.now <= service.most
    assert service.cluster.get("enableInTreeAutoscaling", False) == (service.fewest < service.most)
    if settings.engine.device == "cuda":
        # Kubernetes refuses other requests than limits.
        assert service.worker.limits["nvidia.com/gpu"] == service.worker.requests["nvidia.com/gpu"]
        assert settings.num_gpus == float(service.worker.limits["nvidia.com/gpu"])
        assert (service.fewest, service.most) == (fewest, most)
    else:
        assert "nvidia.com/gpu" not in service.worker.limits
        assert most * settings.replicas.num_cpus <= service.fewest * quantity(service.worker.requests["cpu"])


def test_the_head_takes_no_replica(service: Service) -> None:
    assert service.head.ray_start["num-cpus"] == service.head.ray_start["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in {**service.head.limits, **service.head.requests}


def test_the_proxy_of_the_head_serves_where_there_may_be_no_other() -> None:
    """Serve's proxy on a drained worker closes at once, though the replica serves on."""
    through_the_head = {
        folder: not Service(folder).spec.get("excludeHeadPodFromServeSvc", False) for folder in OVERLAYS
    }
    alone = {folder: Service(folder).fewest == 1 for folder in OVERLAYS}
    assert through_the_head == alone


def test_every_proxy_has_the_front_door(service: Service) -> None:
    for pod in service.pods:
        assert pod.value(front_door.CALLBACK_VARIABLE) == front_door.CALLBACK


def test_replicas_ask_for_keys_and_ray_for_a_token(service: Service) -> None:
    variable = ServeFile.from_dict(service.serve).settings.http.api_keys_variable
    reference = service.worker.environment[variable]["valueFrom"]["secretKeyRef"]
    assert not reference.get("optional", False)
    assert service.cluster["authOptions"]["mode"] == "token"


def test_the_readme_makes_every_secret_that_is_needed(service: Service) -> None:
    made = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", README))
    token = {service.cluster["authOptions"]["secretName"]: "auth_token"}
    wanted = token | {name: key for pod in service.pods for name, key in pod.secrets.items()}
    assert wanted.items() <= made.items()


def test_the_readme_makes_no_other_secret() -> None:
    service = Service(BASE)
    wanted = {service.cluster["authOptions"]["secretName"], *service.worker.secrets}
    assert set(re.findall(r"create secret generic (\S+)", README)) == wanted


def test_ports_are_those_that_serve_and_the_policy_use(folder: str, service: Service) -> None:
    policy = of_kind(folder, "NetworkPolicy")
    assert policy is not None
    to_all, among_pods, operator, prometheus = policy["spec"]["ingress"]
    assert [port["port"] for port in to_all["ports"]] == [service.serve["http_options"]["port"]]
    assert "ports" not in among_pods
    assert [port["port"] for port in operator["ports"]] == [service.head.ports["dashboard"]]
    for pod in service.pods:
        assert pod.ports["serve"] == service.serve["http_options"]["port"]
        assert [port["port"] for port in prometheus["ports"]] == [pod.ports["metrics"]]


def test_selectors_find_the_pods(folder: str, service: Service) -> None:
    policy = of_kind(folder, "NetworkPolicy")
    assert policy is not None
    among_pods = policy["spec"]["ingress"][1]["from"][0]["podSelector"]
    for pod in service.pods:
        for selector in (policy["spec"]["podSelector"], among_pods):
            assert selector["matchLabels"].items() <= pod.labels.items()
    budget = of_kind(folder, "PodDisruptionBudget")
    if budget is not None:
        selected = budget["spec"]["selector"]["matchLabels"].items()
        assert selected <= service.worker.labels.items()
        assert not selected <= service.head.labels.items()
        # As many as always run would keep every node from being emptied, and so would any maxUnavailable.
        assert "maxUnavailable" not in budget["spec"]
        assert 0 < budget["spec"]["minAvailable"] < service.fewest


def test_a_fleet_is_evicted_pod_by_pod() -> None:
    assert of_kind("overlays/fleet", "PodDisruptionBudget") is not None


def test_volumes_and_claims_exist(folder: str, service: Service) -> None:
    claims = [manifest["metadata"]["name"] for manifest in built(folder) if "Claim" in manifest["kind"]]
    wanted = []
    for pod in service.pods:
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        mounted = {mount["name"] for mount in pod.container.get("volumeMounts", [])}
        assert mounted == set(volumes)
        wanted += [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in volumes.values()
            if "persistentVolumeClaim" in volume
        ]
    assert claims == wanted


def test_checkpoints_are_kept_on_the_claim() -> None:
    pod = Service(BASE).worker
    places = {mount["name"]: mount["mountPath"] for mount in pod.container["volumeMounts"]}
    assert places["models"] == pod.value("HF_HOME")


def test_only_the_fleet_mounts_its_checkpoints_on_many_nodes() -> None:
    modes = {}
    for folder in (BASE, "overlays/one-gpu", "overlays/fleet"):
        claim = of_kind(folder, "PersistentVolumeClaim")
        assert claim is not None
        modes[folder] = claim["spec"]["accessModes"]
    assert modes == {
        BASE: ["ReadWriteOnce"],
        "overlays/one-gpu": ["ReadWriteOnce"],
        "overlays/fleet": ["ReadWriteMany"],
    }


def test_shared_memory_holds_rays_store_and_fits_into_the_pod() -> None:
    pod = Service(BASE).worker
    (shm,) = [volume["emptyDir"] for volume in pod.spec["volumes"] if volume["name"] == "shm"]
    places = {mount["name"]: mount["mountPath"] for mount in pod.container["volumeMounts"]}
    assert places["shm"] == "/dev/shm"
    assert shm["medium"] == "Memory"
    store = float(pod.ray_start["object-store-memory"])
    assert store < quantity(shm["sizeLimit"]) < quantity(pod.limits["memory"])


def test_no_container_runs_as_root(service: Service) -> None:
    for pod in service.pods:
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.container["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("folder", OVERLAYS)
def test_overlays_name_an_image_that_the_readme_builds(folder: str) -> None:
    images = {_image(pod) for pod in Service(folder).pods}
    assert len(images) == 1
    assert f"-t {images.pop()} " in README


def _image(pod: Pod) -> str:
    image: str = pod.container["image"]
    return image


def test_one_gpu_is_not_waited_for_twice() -> None:
    assert Service("overlays/one-gpu").spec["upgradeStrategy"] == {"type": "None"}
    assert "upgradeStrategy" not in Service("overlays/fleet").spec
