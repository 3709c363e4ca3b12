"""Fused MLPs in a real engine on the CPU, beside an engine that fuses nothing."""

from typing import Any

import pytest
from fused_models import MODELS
from programs import findings
from test_tiny_models import CLOSE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FUSED = [name for name in MODELS if name != "gemma2"]
LAYERS = {"nested": 8, "plain": 0}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return findings("fused_models.py")


def distance(some: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_all_mlps_are_fused_where_that_is_wanted(found: Any, name: str) -> None:
    for engine, fused in (("unfused", 0), ("rounded_once", 0), ("fused", 2), ("fresh", 2)):
        line = found[name][engine]
        assert (line["fused_mlps"], line["unfused_reasons"]) == (fused, {})
        assert (line["layers"], line["plain_reasons"], line["mixed_steps"]) == (LAYERS, {}, 0)


@pytest.mark.parametrize("name", FUSED)
def test_only_the_rounding_of_the_activation_differs(found: Any, name: str) -> None:
    """vLLM's activation on a CPU, as any eager one, rounds a SiLU to 16 bits before it is multiplied. Where
    it does not, logits are the same, bit for bit."""
    line = found[name]
    fused, unfused = line["fused"]["scores"], line["unfused"]["scores"]
    assert fused == line["rounded_once"]["scores"]
    assert 0 < distance(fused["fp16"], unfused["fp16"]) < CLOSE["float16"]
    # Of an input that is rounded otherwise, quantising to E4M3 makes one that differs by a sixteenth.
    assert distance(fused["fp8"], unfused["fp8"]) < distance(unfused["fp8"], unfused["fp16"])


@pytest.mark.parametrize("name", FUSED)
def test_weights_that_are_reloaded_are_those_of_a_fresh_load(found: Any, name: str) -> None:
    line = found[name]
    assert line["fused"]["reloaded"] == line["fresh"]["scores"]
    assert distance(line["fused"]["scores"]["fp16"], line["fresh"]["scores"]["fp16"]) > 1, "other weights"


def test_a_model_with_another_activation_is_as_it_was(found: Any) -> None:
    line = found["gemma2"]
    assert (line["fused"]["fused_mlps"], line["fused"]["unfused_reasons"]) == (0, {}), "no SwiGLU MLP"
    assert line["fused"]["scores"] == line["unfused"]["scores"]
