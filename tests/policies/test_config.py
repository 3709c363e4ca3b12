"""Settings: every key and value is checked, and the error says what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig, Slo, Water, slo_thresholds


def test_settings_survive_a_round_trip() -> None:
    config = PolicyConfig.from_dict(
        {
            "controller": "threshold",
            "slo": {"ttft_s": 2, "tpot_s": 0.1},
            "thresholds": {"waiting": {"high": 8, "low": 1}},
            "plans": ["mlp-fp8"],
        }
    )
    assert PolicyConfig.from_dict(config.to_dict()) == config
    assert config.water == {"waiting": Water(high=8.0, low=1.0)}
    assert "mlp-fp8" in config.modes


def test_whole_numbers_are_kept_as_such_however_they_are_written() -> None:
    costs = {mode: {"overhead_s": 0.0, "weights_s": 0.01, "token_s": 0.0} for mode in ("fp16", "fp8")}
    config = PolicyConfig.from_dict(
        {"max_flips_per_minute": 4.0, "latency": {"costs": costs, "chunk_tokens": 1e3}}
    )
    assert config.latency is not None
    assert [repr(number) for number in (config.max_flips_per_minute, config.latency.chunk_tokens)] == [
        "4",
        "1000",
    ]


def test_no_thresholds_means_those_of_the_slo() -> None:
    config = PolicyConfig.from_dict({"slo": {"ttft_s": 4.0, "tpot_s": 0.2}})
    assert config.water == slo_thresholds(Slo(ttft_s=4.0, tpot_s=0.2))
    assert all(water.low < water.high for water in config.water.values())
    assert config.water["ttft_p90_s"].high < 4.0


def test_every_batch_may_be_heavy_whatever_is_light() -> None:
    assert PolicyConfig.from_dict({"prediction": {"heavy_batch": 0}}).prediction.light_batch > 0.0


@pytest.mark.parametrize("controller", ["static-fp16", "static-fp8"])
def test_a_baseline_may_keep_the_settings_of_what_it_is_compared_with(controller: str) -> None:
    kept = {"thresholds": {"waiting": {"high": 8, "low": 1}}, "prediction": {"shed": True}}
    assert PolicyConfig.from_dict({"controller": controller, **kept}).prediction.shed


def test_signals_may_wait_longer_where_older_ones_decide() -> None:
    waits = {"sync_wait_s": 10.0, "lease_s": 30.0, "max_signal_age_s": 20.0}
    assert PolicyConfig.from_dict(waits).sync_wait_s == 10.0


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"contoller": "threshold"}, "contoller"),
        ({"controller": "magic"}, "controller"),
        ({"slo": {"ttft": 1}}, "slo.ttft"),
        ({"slo": {"ttft_s": 0}}, "slo.ttft_s"),
        ({"slo": {"percentile": 101}}, "slo.percentile"),
        ({"slo": 1.0}, "slo"),
        ({"thresholds": {"queue": {"high": 1, "low": 0}}}, "thresholds.queue"),
        ({"thresholds": {"waiting": {"high": 1, "low": 2}}}, "thresholds.waiting.low"),
        ({"thresholds": {"waiting": {"high": 1}}}, "thresholds.waiting.low"),
        ({"thresholds": {"waiting": {"high": math.nan, "low": 0}}}, "thresholds.waiting.high"),
        ({"min_dwell_s": -1}, "min_dwell_s"),
        ({"calm_s": "3"}, "calm_s"),
        ({"lease_s": math.inf}, "lease_s"),
        ({"sync_wait_s": 3.0, "lease_s": 5.0}, "sync_wait_s"),
        ({"sync_wait_s": 10.0, "lease_s": 30.0}, "sync_wait_s"),
        ({"decide_interval_s": 2.0}, "decide_interval_s"),
        ({"controller": "threshold", "prediction": {"shed": True}}, "prediction.shed"),
        ({"controller": "predictive", "thresholds": {"waiting": {"high": 8, "low": 1}}}, "thresholds"),
        ({"max_flips_per_minute": 1}, "max_flips_per_minute"),
        ({"max_flips_per_minute": 2.5}, "max_flips_per_minute"),
        ({"panic_factor": 0.5}, "panic_factor"),
        ({"dry_run": "yes"}, "dry_run"),
        ({"prediction": {"light_batch": 0.3, "heavy_batch": 0.2}}, "prediction.light_batch"),
        ({"prediction": {"heavy_batch": 1.5}}, "prediction.heavy_batch"),
        ({"prediction": {"light_first_token": 0.0}}, "prediction.light_first_token"),
        ({"prediction": {"give_up": 0.9}}, "prediction.give_up"),
        ({"plans": "mlp"}, "plans"),
        ({"plans": ["Not A Name"]}, "plans"),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        PolicyConfig.from_dict(settings)
    assert caught.value.field == field
    assert caught.value.remedy
