"""Supported classes of models in a real engine on the CPU: what is nested, and logits beside plain vLLM's."""

from typing import Any

import pytest
from programs import findings
from tiny_models import MODELS, PROMPTS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

CLOSE = {"float16": 0.01, "bfloat16": 0.05}
"""Of a log-probability: the same products, summed in another order."""

EXPECTED = {
    "mixtral": ({"nested": 4, "plain": 2}, {"mixture-of-experts weights": 2}),
}
"""Layers and reasons where not all are nested: QKV, output, gate with up, and down of two layers."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    return findings("tiny_models.py")


@pytest.mark.parametrize("name", MODELS)
def test_a_class_of_models_is_nested_and_computes_what_plain_vllm_does(found: Any, name: str) -> None:
    line = found[name]
    assert (line["layers"], line["plain_reasons"]) == EXPECTED.get(name, ({"nested": 8, "plain": 0}, {}))
    assert line["steps"] == {"fp16": 1, "fp8": 1}
    assert line["mixed_steps"] == 0
    assert len(line["plain"]) == sum(len(prompt) - 1 for prompt in PROMPTS)

    def distance(mode: str) -> float:
        pairs = zip(line["plain"], line[mode], strict=True)
        return max(abs(plain - ours) for (plain, _), (ours, _) in pairs)

    assert distance("fp16") < CLOSE[MODELS[name][1]]
    assert CLOSE[MODELS[name][1]] < distance("fp8") < 1.5, "FP8 is another computation, and of the same model"
