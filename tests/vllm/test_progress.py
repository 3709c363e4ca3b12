import math
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.vllm.choice import Choice, Limits, StepFacts, choose
from nestedfp.vllm.progress import Progress, all_late, queued_tokens

PACE = Limits(
    pace_s=0.033,
    debt_s=0.0,
    queue_tokens=4000,
    wait_s=0.2,
    overhead_s=0.002,
    weights_s=0.006,
    token_s=24e-6,
)


def requests(**tokens: int) -> dict[str, Any]:
    return {key: SimpleNamespace(num_output_tokens=made, arrival_time=90.0) for key, made in tokens.items()}


def fp8(limits: Limits = PACE, **facts: Any) -> bool:
    return choose(StepFacts(**{"tokens": 8, "waiting": 0, "kv_usage": 0.1, **facts}), Choice(), limits).fp8


def test_a_large_step_is_in_fp8_only_where_somebody_would_fall_behind() -> None:
    assert not fp8(tokens=2048)
    assert fp8(tokens=2048, running=[(0, 0.0)])
    assert not fp8(tokens=1000, running=[(0, 0.0)])
    assert not fp8(tokens=2048, running=[(10, 0.1)])


def test_a_debt_lets_a_request_fall_behind_for_a_while() -> None:
    limits = Limits.from_dict({"pace_s": 0.033, "debt_s": 0.05, "token_s": 24e-6})
    assert not fp8(limits, tokens=2048, running=[(0, 0.02)])
    assert fp8(limits, tokens=2048, running=[(0, 0.04)])


@pytest.mark.parametrize(
    ("facts", "signal"),
    [
        ({"waiting_prompt_tokens": 4000}, "waiting_prompt_tokens 4000 >= 4000"),
        ({"oldest_wait_s": 0.25}, "oldest_wait_s 0.250 >= 0.2"),
        ({"kv_usage": 0.95}, "kv_usage 0.95 >= 0.9"),
        ({"running": [(3, 0.2)]}, "3 tokens in 0.200 s"),
    ],
)
def test_what_asks_for_fp8_is_named(facts: dict[str, Any], signal: str) -> None:
    step = StepFacts(**{"tokens": 8, "waiting": 0, "kv_usage": 0.1, **facts})
    assert signal in choose(step, Choice(), PACE).reason


def test_the_clock_of_a_request_starts_with_its_first_token() -> None:
    progress = Progress()
    assert progress.of(["a", "b"], requests(a=0, b=5), 10.0, 90.0)[0] == [(0, 0.0)]
    assert progress.of(["a", "b"], requests(a=1, b=7), 11.0, 91.0)[0] == [(0, 0.0), (2, 1.0)]
    progress.forget(["b"])
    assert progress.of(["b"], requests(b=8), 12.0, 92.0)[0] == [(0, 0.0)]
    assert progress.of(["gone"], {}, 12.0, 92.0) == ([], 0.0)


def test_prompts_age_until_their_first_token() -> None:
    assert Progress().of(["a", "b"], requests(a=0, b=3), 1.0, 91.0)[1] == pytest.approx(1.0)
    assert Progress().of(["b"], requests(b=3), 1.0, 91.0)[1] == 0.0
    assert Progress().of(["a"], requests(a=0), 1.0, 89.0)[1] == 0.0, "clocks may differ"


def test_a_queue_is_counted_only_as_far_as_it_matters() -> None:
    queue = [SimpleNamespace(num_prompt_tokens=1000, num_computed_tokens=0)] * 50
    assert queued_tokens(queue[:2], 4000) == 2000
    assert queued_tokens(queue, 4000) == 4000


def test_a_request_whose_first_token_is_late_asks_for_nothing() -> None:
    progress = Progress()
    assert progress.of(["a"], requests(a=0), 10.0, 91.5, late_s=1.0) == ([], 0.0)
    for tokens in (1, 2):
        assert progress.of(["a"], requests(a=tokens), 10.5, 92.0, late_s=1.0)[0] == []
    assert progress.of(["b"], requests(b=1), 10.5, 90.9, late_s=1.0)[0] == [(0, 0.0)]
    assert progress.of(["b"], requests(b=2), 12.5, 92.9, late_s=1.0)[0] == [(1, 2.0)], (
        "its first token was not"
    )
    assert progress.of(["c"], requests(c=7), 10.5, 95.0, late_s=1.0)[0] == [(0, 0.0)], "when was its first?"


def test_a_queue_is_lost_when_all_of_it_is_late() -> None:
    queue = [SimpleNamespace(arrival_time=at) for at in (1.0, 2.0, 3.0)]
    assert all_late(queue, 3.5)
    assert not all_late(queue, 3.0)
    assert not all_late(queue, -math.inf)
    assert all_late([], 3.5)


def test_a_negative_limit_is_named() -> None:
    with pytest.raises(ValueError, match="debt_s is -1"):
        Limits.from_dict({"pace_s": 0.033, "debt_s": -1})
