"""Rules and dashboard ask for metrics that exist, and each alert fires on what it is about."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.telemetry.open_telemetry_metric_recorder import NAMESPACE

from nestedfp.deployments import metrics
from nestedfp.deployments.cluster import DEPLOYMENT
from nestedfp.deployments.metrics import ReplicaMetrics
from nestedfp.policies.config import PolicyConfig

from .manifests import BASE, K8S, OVERLAYS, Service

MONITORING = K8S / "monitoring"
GROUPS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
ALL_EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
]
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The series that Ray exports for our metrics, with their labels."""
    series: dict[str, set[str]] = {}

    def make(kind: str) -> Any:
        def made(name: str, tag_keys: tuple[str, ...], **_: Any) -> None:
            for suffix in SUFFIXES[kind]:
                series[f"{NAMESPACE}_{name}{suffix}"] = set(tag_keys)

        return made

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, make(kind.lower()))
    ReplicaMetrics("r1")
    return series


def asked(prefix: str) -> set[str]:
    return {name for text in ALL_EXPRESSIONS for name in re.findall(rf"\b{NAMESPACE}_{prefix}_\w+", text)}


def test_our_metrics_exist(own: dict[str, set[str]]) -> None:
    assert asked("nestedfp") <= set(own)


def test_every_metric_of_ours_but_the_counts_of_layers_is_on_the_dashboard(own: dict[str, set[str]]) -> None:
    shown = " ".join(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"])
    counts = {f"{NAMESPACE}_nestedfp_{name}" for name in ("layers", "fused_mlps")}
    missing = {name for name in own if name not in shown} - counts
    assert {name for name in missing if not name.endswith(("_sum", "_count"))} == set()


def test_labels_asked_for_are_those_of_the_metrics(own: dict[str, set[str]]) -> None:
    known = set().union(*own.values()) | {"namespace", "le", "deployment", "status_code"}
    for text in ALL_EXPRESSIONS:
        grouped = [name for group in re.findall(r"by \(([^)]*)\)", text) for name in group.split(", ")]
        assert set(grouped) <= known
        for metric, selector in re.findall(r"\b(ray_nestedfp_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)=", selector)) <= own[metric] | {"namespace"}


def test_metrics_of_serve_exist() -> None:
    source = "".join(path.read_text() for path in (_package("ray") / "serve" / "_private").glob("*.py"))
    source = source.replace("{protocol_name}", "http")
    names = asked("serve")
    assert names
    for name in names:
        # Ray ends the name of a counter in `_total`.
        assert f'"{name.removeprefix("ray_").removesuffix("_total")}"' in source, name
    assert f'deployment="{DEPLOYMENT}"' in " ".join(ALL_EXPRESSIONS)


def test_metrics_of_vllm_exist() -> None:
    if find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    source = (_package("vllm") / "v1" / "metrics" / "loggers.py").read_text()
    names = asked("vllm")
    assert names
    for name in names:
        # Its Ray wrapper writes `_` for `:`.
        assert f'"vllm:{name.removeprefix("ray_vllm_").removesuffix("_bucket")}"' in source, name


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.parametrize("folder", [BASE, *OVERLAYS])
def test_every_pod_is_scraped(folder: str) -> None:
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())["spec"]
    for pod in Service(folder).pods:
        assert monitor["selector"]["matchLabels"].items() <= pod.labels.items()
        assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= set(pod.ports)


def test_the_readme_lists_every_alert() -> None:
    listed = re.findall(r"^\| `(NestedFP\w+)` \|", (K8S / "README.md").read_text(), re.MULTILINE)
    assert listed == [rule["alert"] for rule in RULES]


def test_flapping_is_half_of_what_the_policy_allows() -> None:
    (rule,) = [rule for rule in RULES if rule["alert"] == "NestedFPFlapping"]
    assert "[10m]" in rule["expr"]
    assert float(rule["expr"].rpartition(">")[2]) == 10 * PolicyConfig().max_flips_per_minute / 2


def test_dashboards_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert all(place["x"] + place["w"] <= 24 for place in places)


# What is scraped once a minute, as promtool writes series: a start, a step and a number of steps.
LAG = "ray_nestedfp_target_lag_seconds_bucket"
HEALTHY = 'ray_serve_deployment_replica_healthy{namespace="n", deployment="EngineReplica", replica="r1"}'
WANTED = 'ray_serve_autoscaling_target_replicas{namespace="n", deployment="EngineReplica"}'
REQUESTS = 'ray_serve_num_http_requests_total{namespace="n", status_code="'
CALM = {
    'ray_nestedfp_policy_up{namespace="n", replica="r1"}': "1x60",
    'ray_nestedfp_slo_headroom{namespace="n", replica="r1", signal="ttft"}': "0.4x60",
    'ray_nestedfp_precision{namespace="n", replica="r1", precision="fp8"}': "1x30 0x30",
    'ray_nestedfp_flips_total{namespace="n", replica="r1", to="fp8"}': "0+2x60",
    f'{LAG}{{namespace="n", replica="r1", le="0.01"}}': "0+60x60",
    f'{LAG}{{namespace="n", replica="r1", le="5"}}': "0+60x60",
    f'{LAG}{{namespace="n", replica="r1", le="+Inf"}}': "0+60x60",
    HEALTHY: "1x60",
    WANTED: "1x60",
    f'{REQUESTS}200"}}': "0+600x60",
    f'{REQUESTS}503"}}': "0+6x60",
}
TROUBLE: dict[str, dict[str, str]] = {
    "NestedFPDown": {'ray_nestedfp_policy_up{namespace="n", replica="r1"}': "_x60"},
    "NestedFPReplicasMissing": {WANTED: "2x60"},
    "NestedFPRequestsFailing": {f'{REQUESTS}503"}}': "0+60x60"},
    "NestedFPSloMissed": {'ray_nestedfp_slo_headroom{namespace="n", replica="r1", signal="ttft"}': "-0.2x60"},
    "NestedFPOnlyFp8": {'ray_nestedfp_precision{namespace="n", replica="r1", precision="fp8"}': "1x60"},
    "NestedFPPolicyLost": {'ray_nestedfp_policy_up{namespace="n", replica="r1"}': "0x60"},
    "NestedFPFlapping": {'ray_nestedfp_flips_total{namespace="n", replica="r1", to="fp8"}': "0+4x60"},
    "NestedFPOrdersLate": {f'{LAG}{{namespace="n", replica="r1", le="0.01"}}': "0+1x60"},
}


def promtool(*arguments: str) -> tuple[bool, str]:
    """Whether it is content, and what it says."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool")
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60)
    return result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": GROUPS}))
    return path


def fires_after_an_hour(rules: Path, series: dict[str, str]) -> dict[str, bool]:
    """Which alerts fire: promtool is told to expect none, of one alert after the other."""
    fires = {}
    for rule in RULES:
        test = {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": "59m", "alertname": rule["alert"], "exp_alerts": []}],
        }
        path = rules.with_name("test.yaml")
        path.write_text(yaml.safe_dump({"rule_files": [rules.name], "tests": [test]}))
        silent, said = promtool("test", "rules", str(path))
        assert silent or "got:[" in "".join(said.split()), said
        fires[rule["alert"]] = not silent
    return fires


def test_every_expression_can_be_parsed(tmp_path: Path) -> None:
    variables = {"$namespace": "n", "$__rate_interval": "1m"}
    recorded = []
    for number, text in enumerate(ALL_EXPRESSIONS):
        for variable, value in variables.items():
            text = text.replace(variable, value)
        recorded.append({"record": f"expression:{number}", "expr": text})
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": recorded}]}))
    content, said = promtool("check", "rules", str(path))
    assert content, said


def test_no_alert_fires_in_calm(rules: Path) -> None:
    assert not any(fires_after_an_hour(rules, CALM).values())


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_an_alert_fires_alone_on_its_trouble(rules: Path, alert: str) -> None:
    fires = fires_after_an_hour(rules, CALM | TROUBLE[alert])
    assert [name for name, fired in fires.items() if fired] == [alert]
