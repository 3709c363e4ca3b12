import pytest

from nestedfp.precision import Precision
from nestedfp.vllm.settings import Inexact, Settings


def test_defaults_serve_fp16_and_fp8() -> None:
    settings = Settings.from_dict({})
    assert settings == Settings()
    assert list(settings.plans) == ["fp16", "fp8"]
    assert settings.inexact is Inexact.AUTO
    assert settings.fuse_silu
    assert not Settings.from_dict({"fuse_silu": False}).fuse_silu


def test_a_named_plan_gives_its_kinds_fp8_and_all_others_fp16() -> None:
    plan = Settings.from_dict({"plans": {"mlp": ["gate_up_proj", "down_proj"]}}).plans["mlp"]
    assert plan.precision("down_proj") is Precision.FP8
    assert plan.precision("qkv_proj") is Precision.FP16


def test_the_example_of_a_plan_is_asked_for_by_name() -> None:
    plan = Settings.from_dict({"plans": ["mlp"], "target": "mlp"}).plans["mlp"]
    kinds = ("gate_up_proj", "down_proj", "fc1", "qkv_proj", "o_proj")
    in_fp8 = {kind for kind in kinds if plan.precision(kind) is Precision.FP8}
    assert in_fp8 == {"gate_up_proj", "down_proj", "fc1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"precision": "fp8"}, r"unknown keys \['precision'\]"),
        ({"quant_method": "fp8"}, "quant_method is 'fp8', expected 'nestedfp'"),
        ({"inexact": "drop"}, r"inexact is 'drop', expected one of \['auto', 'plain', 'nearest'\]"),
        ({"graph_reserve_gib": -1}, "graph_reserve_gib is -1, expected a number of GiB"),
        ({"target": "mlp"}, "mode is 'mlp', expected one of"),
        ({"target": ["fp8"]}, "mode is .*, expected one of"),
        ({"check_steps": "no"}, "check_steps is 'no', expected true or false"),
        ({"fuse_silu": 1}, "fuse_silu is 1, expected true or false"),
        ({"limits": 5}, "limits is 5, expected a mapping"),
        ({"plans": 5}, "plans is 5, expected names of plans"),
        ({"plans": {"fp8": ["down_proj"]}}, "'fp8' is already a mode"),
        ({"plans": {"mlp": "down_proj"}}, "expected a list of layer kinds"),
        ({"plans": ["attention"]}, r"\['attention'\] ship with no layer kinds, expected some of \['mlp'\]"),
        ({"plans": {"mlp": []}}, "expected a list of layer kinds"),
    ],
)
def test_bad_settings_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(data)
