"""What a replica exports, with stand-ins for Ray's metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray._private.telemetry.open_telemetry_metric_recorder import NAMESPACE

from nestedfp.deployments import metrics
from nestedfp.deployments.metrics import ReplicaMetrics, served_by
from nestedfp.policies.config import Slo
from nestedfp.policies.replica import Order

from .engine_status import engine_status

README = Path(__file__).parents[2] / "deployments" / "README.md"
Values = dict[tuple[str, str], float]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Name and labels (less the replica) -> value, of everything that is exported."""
    values: Values = {}

    class Series:
        def __init__(self, name: str, tag_keys: tuple[str, ...], **_: Any) -> None:
            self._name, self._keys = name, tag_keys

        def _key(self, tags: dict[str, str]) -> tuple[str, str]:
            assert set(tags) == set(self._keys)
            return self._name, " ".join(tags[key] for key in self._keys[1:])

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._key(tags)] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            values[self._key(tags)] = values.get(self._key(tags), 0.0) + value

        observe = set

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, Series)
    return values


def test_the_readme_lists_every_metric_with_its_kind_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[tuple[str, str, str]] = set()

    def series(kind: str) -> Any:
        def make(name: str, tag_keys: tuple[str, ...], **_: Any) -> None:
            assert tag_keys[0] == "replica"
            made.add((f"`{NAMESPACE}_{name}`", kind, ", ".join(tag_keys[1:])))

        return make

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, series(kind.lower()))
    ReplicaMetrics("r1")
    lines = README.read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `ray_nestedfp_")]
    assert {tuple(cell.strip() for cell in row[1:4]) for row in rows} == made
    assert len(rows) == len(made)


def test_an_engine_tells_of_its_layers(exported: Values) -> None:
    ReplicaMetrics("r1").engine(engine_status(layers={"nested": 8, "plain": 1}, fused_mlps=2))
    assert exported["nestedfp_layers", "plain"] == 1
    assert exported["nestedfp_fused_mlps", ""] == 2


def test_an_engines_own_counts_are_told_as_they_grow(exported: Values) -> None:
    told = ReplicaMetrics("r1")
    for flips, cut in ((2, 5), (2, 9), (30, 9)):
        told.engine(engine_status(flips=flips, bounded_steps=cut, tokens={"fp16": flips, "fp8": cut}))
    assert exported["nestedfp_engine_flips_total", ""] == 30
    assert exported["nestedfp_cut_steps_total", ""] == 9
    assert exported["nestedfp_tokens_total", "fp16"] == 30
    assert exported["nestedfp_tokens_total", "fp8"] == 9
    assert not any(name == "nestedfp_flips_total" for name, _ in exported)


def test_headroom_recovers_when_nobody_calls(exported: Values) -> None:
    told = ReplicaMetrics("r1")
    told.latencies(Slo(ttft_s=1.0, tpot_s=0.1), ttft_s=3.0, tpot_s=0.05)
    assert exported["nestedfp_slo_headroom", "ttft"] == -2.0
    assert exported["nestedfp_slo_headroom", "tpot"] == 0.5
    told.latencies(Slo(ttft_s=1.0, tpot_s=0.1), ttft_s=None, tpot_s=None)
    assert exported["nestedfp_slo_headroom", "ttft"] == 1.0
    assert exported["nestedfp_slo_headroom", "tpot"] == 1.0


def test_changes_of_the_target_are_counted_with_who_ordered_them(exported: Values) -> None:
    told = ReplicaMetrics("r1")
    for mode, source in (("fp16", "actor"), ("fp8", "actor"), ("fp8", "local"), ("fp16", "local")):
        told.order(Order(mode, 1, "", None, source), 0.002)
    flips = {labels: count for (name, labels), count in exported.items() if name == "nestedfp_flips_total"}
    assert flips == {"fp16 fp8 policy": 1.0, "fp8 fp16 alone": 1.0}


def test_requests_are_counted_by_class_and_what_served_them(exported: Values) -> None:
    told = ReplicaMetrics("r1")
    told.request(strict=True, status=503, tokens=None, waited_s=0.5)
    told.request(strict=False, status=200, tokens={"fp16": 1, "fp8": 2}, waited_s=0.0)
    assert exported["nestedfp_requests_total", "fp16 503"] == 1.0
    assert exported["nestedfp_requests_total", "any mixed"] == 1.0
    assert exported["nestedfp_strict_wait_seconds", ""] == 0.5


def test_a_way_to_the_engine_is_observed_where_it_is_known(exported: Values) -> None:
    told = ReplicaMetrics("r1")
    told.request(strict=False, status=200, tokens=None, waited_s=0.0)
    assert ("nestedfp_delay_to_engine_seconds", "") not in exported
    told.request(strict=False, status=200, tokens=None, waited_s=0.0, delay_s=0.2)
    assert exported["nestedfp_delay_to_engine_seconds", ""] == 0.2


@pytest.mark.parametrize(
    ("status", "tokens", "label"),
    [
        (200, {"fp16": 3, "fp8": 0}, "fp16"),
        (200, {"fp16": 0, "fp8": 2}, "fp8"),
        (200, {"fp16": 1, "fp8": 2}, "mixed"),
        (200, None, "200"),
        (503, None, "503"),
        (499, {"fp16": 3, "fp8": 0}, "499"),
    ],
)
def test_label_of_a_served_request(status: int, tokens: dict[str, int] | None, label: str) -> None:
    assert served_by(status, tokens) == label
