"""``nestedfp report policy``: tables and pictures from the data, and the check that they are fresh."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nestedfp.cli import main
from nestedfp.deployments.policy_report import BEGIN, END


def figures(attainment: float, share: float, **more: Any) -> dict[str, Any]:
    return {"attainment": attainment, "fp16_token_share": share, "max_flips_in_a_minute": 2, **more}


@pytest.fixture
def data() -> dict[str, Any]:
    policies = {
        "static-fp16": figures(0.5, 1.0),
        "static-fp16-cut": figures(0.6, 1.0),
        "static-fp8": figures(0.99, 0.0),
        "static-fp8-cut": figures(0.995, 0.0),
        "threshold": figures(0.97, 0.4, points_below_static_fp8=2.0, violations_cut=0.94),
        "predictive": figures(
            0.985, 0.6, points_below_static_fp8=0.5, points_below_static_fp8_cut=1.0, violations_cut=0.97
        ),
    }
    oracle = {"attainment": 0.985, "fp16_token_share": 0.65, "bound": 0.8, "predictive_over_oracle": 0.923}
    timeline = {
        "t_s": [30.0, 31.0],
        "arrivals": [5, 9],
        "waiting": [0, 3],
        "running": [4, 8],
        "replicas": [2, 2],
        "modes": [[0, 0], [2, 1]],
        "fp8_token_share": [0.0, 0.5],
        "ttft_p90_s": [0.1, None],
    }
    row = {"load": "wave", "share": 0.9, "capacity_rps": 12.5, "policies": policies, "oracle": oracle}
    return {
        "label": "simulated: a test",
        "settings": {"replicas": 2, "seed": 1, "held_out_seed": 7},
        "loads": [{**row, "timeline": timeline}],
        "decide_ms": {"replicas": 1000, "rounds": 9, "p50": 4.25, "p95": 5.0, "max": 6.0},
    }


@pytest.fixture
def folder(tmp_path: Path, data: dict[str, Any]) -> Path:
    (tmp_path / "policy.md").write_text(f"# Policies\n\n{BEGIN}\nold\n{END}\n\nEnd.\n")
    (tmp_path / "data.json").write_text(json.dumps(data))
    return tmp_path


@pytest.fixture
def live() -> dict[str, Any]:
    seconds = {"only": 9, "mostly": 45, "time_share": 0.7}
    run = {
        "policy": "predictive",
        "scale": 0.25,
        "violating_seconds": 0,
        "seconds_in_fp16": seconds,
        "tokens_in_fp16": 0.5,
    }
    return {
        "date": "2026-11-24T10:00:00+00:00",
        "machine": {"processor": "a processor", "cores": 2, "ray": "2.60.0"},
        "engine": "simulated: a test",
        "trace": "minute.csv",
        "seconds": 60,
        "scale": 0.25,
        "requests": 700,
        "runs": [{**run, "policy": "another scale", "scale": 0.3}, run],
    }


def call(folder: Path, *more: str) -> int:
    data, live = str(folder / "data.json"), str(folder / "live.json")
    return main(["report", "policy", "--data", data, "--live", live, "--docs", str(folder), *more])


def test_tables_and_pictures_are_written_and_then_fresh(folder: Path) -> None:
    assert call(folder, "--check") == 1
    assert call(folder) == 0
    assert call(folder, "--check") == 0
    page = (folder / "policy.md").read_text()
    assert page.startswith("# Policies")
    assert page.endswith("End.\n")
    assert "simulated: a test" in page
    assert "| wave | 90 % of 12.5/s | 50.00 (60.00) | 99.00 (99.50) | 97.00 | 98.50 |" in page
    assert "| 98.50 | +0.50 (+1.00) | 97.0 % | 0.600 |" in page
    assert "0.650 (0.800) | 0.92 | – | 2 |" in page
    assert "takes 4.2 ms of CPU" in page
    for name in ("policy-front.svg", "policy-burst.svg"):
        root = ElementTree.fromstring((folder / name).read_text())
        assert root.tag.endswith("svg")
    front = (folder / "policy-front.svg").read_text()
    assert front.count("<circle") == 7 + 7


def test_the_bars_say_which_loads_miss_them(folder: Path, data: dict[str, Any]) -> None:
    met = data["loads"][0]
    policies = {**met["policies"], "predictive": {**met["policies"]["predictive"]}}
    policies["predictive"]["points_below_static_fp8"] = 1.25
    oracle = {**met["oracle"], "predictive_over_oracle": 0.8}
    data["loads"].append({**met, "load": "gamma", "share": 1.2, "policies": policies, "oracle": oracle})
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "Within 1 point of static FP8: 1 of 2 loads; gamma at 120 % is 1.25 below." in page
    assert "At least 0.90 of the oracle's share: 1 of 2; gamma at 120 % 0.8000." in page


@pytest.mark.parametrize(
    ("share", "ratio", "shown"), [(0.5, 0.875, "97.50; 0.500; 0.88"), (None, None, "97.50; none keeps it; –")]
)
def test_the_oracle_on_unseen_noise_is_shown(
    folder: Path, data: dict[str, Any], share: float | None, ratio: float | None, shown: str
) -> None:
    held = {"found_share": 0.6, "found_attainment": 0.975, "share": share, "predictive_over_held": ratio}
    data["loads"][0]["oracle"]["unseen_noise"] = held
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 0
    assert f"| 0.92 | {shown} | 2 |" in (folder / "policy.md").read_text()


def test_loads_on_a_measured_engine_have_their_own_table(folder: Path, data: dict[str, Any]) -> None:
    row = data["loads"][0]
    predictive = {**row["policies"]["predictive"], "label": "simulated: step times fitted to a card"}
    policies = {**row["policies"], "predictive": predictive}
    data["measured"] = [{**row, "capacity_rps": 11.0, "policies": policies}]
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "Seed 1; simulated: step times fitted to a card." in page
    assert "| wave | 90 % of 11.0/s |" in page
    assert page.count("Within 1 point of static FP8: 1 of 1 loads.") == 2


def test_how_far_the_simulator_is_off_is_shown_by_figure(folder: Path, data: dict[str, Any]) -> None:
    data["calibration"] = [
        {
            "file": "engine-card.json", "dtype": "float16", "mode": "fp8",
            "cells": [[1, 32, 512], [8, 128, 128], [32, 1024, 64]],
            "roofline_errors": [[0.2, -0.5, 0.1], [0.1, 0.0, 0.1], [-0.3, 0.1, 0.1]],
            "fitted_errors": [[0.01, -0.25, 0.0], [0.02, 0.05, 0.0], [-0.04, 0.1, 0.0]],
        }
    ]  # fmt: skip
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "| throughput | 20.0 % (-30 %) | 2.0 % (-4 %, at 32, 1024/64) | 3 of 3 cells |" in page
    assert "| TTFT | 10.0 % (-50 %) | 10.0 % (-25 %, at 1, 32/512) | 2 of 3 cells |" in page


def test_steady_flips_are_shown_with_and_without_the_first_minute(folder: Path, data: dict[str, Any]) -> None:
    policies = data["loads"][0]["policies"]
    flips = {"flips_per_replica_hour": 1.0, "settled_flips_per_replica_hour": 0.0}
    both = {
        "static-fp16": {**policies["static-fp16"], "flips_per_replica_hour": 0.0},
        "predictive": {**policies["predictive"], **flips},
    }
    data["steady"] = {"policies": both}
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "| static-fp16 | 50.00 | 1.000 | 0.00 | – |" in page
    assert "| predictive | 98.50 | 0.600 | 1.00 | 0.00 |" in page


def test_the_live_minute_is_shown_where_it_was_run(folder: Path, live: dict[str, Any]) -> None:
    assert call(folder) == 0
    assert "Ray Serve" not in (folder / "policy.md").read_text()
    (folder / "live.json").write_text(json.dumps({"minute": live}))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "| predictive | 0 | 45, 75.0 % | 9 | 70.0 % | 0.500 |" in page
    assert "another scale" not in page
    assert "2 cores of a processor, 2026-11-24" in page
    assert "scaled once by 0.2500: 700 requests; one run each" in page


def test_how_fast_orders_arrive_is_shown_where_it_was_measured(folder: Path, live: dict[str, Any]) -> None:
    report = {
        "date": live["date"],
        "machine": live["machine"],
        "engine": "a model",
        "replicas": 8,
        "streams_per_replica": 2,
        "decisions": 200,
        "to_last_replica_ms": {"p50": 19.51, "p95": 25.06, "max": 28.3},
        "to_each_replica_ms": {"p50": 16.66, "p95": 22.07, "max": 28.3},
    }
    (folder / "live.json").write_text(json.dumps({"delivery-cpu": report}))
    assert call(folder) == 0
    row = "| 8 replicas, a model | 2 | 200 | 20, 25, 28 | 17, 22 | 2 cores of a processor, 2026-11-24 |"
    assert row in (folder / "policy.md").read_text()


def test_of_several_live_runs_medians_are_shown(folder: Path, live: dict[str, Any]) -> None:
    run = live["runs"][-1]
    others = [
        {
            **run,
            "violating_seconds": count,
            "seconds_in_fp16": {"only": 9, "mostly": mostly, "time_share": 0.8},
        }
        for count, mostly in ((3, 42), (1, 44))
    ]
    others.append({**run, "violating_seconds": 50, "counted": False})
    (folder / "live.json").write_text(json.dumps({"minute": {**live, "runs": [run, *others]}}))
    assert call(folder) == 0
    page = (folder / "policy.md").read_text()
    assert "| predictive | 1 (0–3) | 44 (42–45), 73.3 % | 9 | 80.0 % | 0.500 |" in page
    assert "medians of up to 3 runs each" in page


def test_data_that_lacks_a_part_is_named(
    folder: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del data["loads"]
    (folder / "data.json").write_text(json.dumps(data))
    assert call(folder) == 2
    assert "loads" in capsys.readouterr().err
