"""What the requests of vLLM's scheduler ask of the next step."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.policies.steps import StepBounds, StepTerms, StepWork
from nestedfp.vllm.progress import Progress

BOUNDS = StepBounds(
    pace_s=0.02,
    tpot_s=0.03,
    ttft_s=0.7,
    late_s=1.0,
    least_tokens=256.0,
    light_ttft_s=0.8,
    given_up_s=1.5,
    light_s=0.0,
    heavy_s=0.0,
)
FAST = StepTerms(0.002, 0.003, 1e-5, 0.001, 1e-5, 0.0)


def request(
    key: str, made: int, *, computed: int = 100, prompt: int = 100, at: float = 90.0, **more: Any
) -> Any:
    return SimpleNamespace(
        request_id=key,
        arrival_time=at,
        num_prompt_tokens=prompt,
        num_computed_tokens=computed,
        num_output_tokens=made,
        num_tokens=prompt + made,
        **more,
    )


def work(
    progress: Progress,
    *running: Any,
    waiting: tuple[Any, ...] = (),
    now: float = 10.0,
    wall: float = 90.5,
    ahead_s: float = 0.0,
    bounds: StepBounds = BOUNDS,
) -> StepWork:
    return progress.work(
        running,
        waiting,
        bounds,
        FAST,
        now=now,
        wall=wall,
        ahead_s=ahead_s,
        most_tokens=2048,
        crowded=False,
    )


def test_the_clock_of_a_request_starts_with_its_first_token() -> None:
    progress = Progress()
    first = work(progress, request("a", 1), request("b", 5))
    assert (first.pace_left_s, first.slo_left_s) == (0.02, 0.03)
    later = work(progress, request("a", 3), request("b", 6), now=10.05)
    # The next token of `a` is its third after the first seen, that of `b` the second.
    assert later.pace_left_s == pytest.approx(2 * 0.02 - 0.05)
    assert later.slo_left_s == pytest.approx(2 * 0.03 - 0.05)
    progress.forget(["b"])
    assert work(progress, request("b", 7), now=12.0).pace_left_s == 0.02
    progress.clear()
    assert work(progress, request("a", 9), now=13.0).pace_left_s == 0.02


def test_what_has_missed_the_slo_asks_for_no_time() -> None:
    progress = Progress()
    work(progress, request("a", 1), request("b", 1))
    later = work(progress, request("a", 2), request("b", 9), now=10.1)
    assert later.pace_left_s == pytest.approx(2 * 0.02 - 0.1)
    assert later.slo_left_s == pytest.approx(9 * 0.03 - 0.1)


def test_tokens_in_flight_and_their_time_count_as_made_and_gone() -> None:
    progress = Progress()
    work(progress, request("a", 1))
    ahead = work(progress, request("a", 3, num_output_placeholders=2), now=10.02, ahead_s=0.05)
    assert ahead.pace_left_s == pytest.approx(5 * 0.02 - 0.07)


def test_prompts_come_in_their_order_the_batch_first() -> None:
    todo = work(
        Progress(),
        request("a", 4),
        request("b", 0, computed=60),
        waiting=(request("c", 0, computed=0, at=90.4), request("d", 3, computed=0)),
        ahead_s=0.1,
    )
    assert todo.prompt_tokens == (40, 100, 103)
    assert todo.prompt_context == (60, 0, 0)
    assert todo.prompt_age_s == (pytest.approx(0.6), pytest.approx(0.2), -math.inf), "one was preempted"
    assert (todo.decodes, todo.requests, todo.context) == (1, 2, 160)


def test_a_prompt_whose_first_token_is_in_flight_decodes_and_is_not_timed_yet() -> None:
    todo = work(Progress(), request("a", 0, num_output_placeholders=1))
    assert (todo.decodes, todo.pace_left_s, todo.prompt_tokens) == (1, math.inf, ())


def test_clocks_may_differ() -> None:
    assert work(Progress(), waiting=(request("a", 0, computed=0, at=95.0),)).prompt_age_s == (0.0,)


def test_a_request_whose_first_token_is_late_asks_for_nothing() -> None:
    progress = Progress()
    for made in (1, 2):
        late = work(progress, request("a", made), wall=91.5)
        assert (late.pace_left_s, late.slo_left_s, late.decodes) == (math.inf, math.inf, 1)
    assert work(progress, request("b", 1), wall=90.9).pace_left_s == 0.02
    assert work(progress, request("b", 2), wall=92.9).pace_left_s == 0.04, "its first token was in time"
    assert work(progress, request("c", 7), wall=95.0).pace_left_s == 0.02, "when was its first?"


def test_a_light_batch_may_take_the_whole_limit() -> None:
    """One request of 100 tokens takes FP8 4 ms at any size of the step, three take 8."""
    bounds = BOUNDS._replace(light_s=0.004, heavy_s=0.012)
    running = [request(key, 1) for key in "abc"]
    assert work(Progress(), running[0], bounds=bounds).pace_left_s == 0.03
    assert work(Progress(), *running, bounds=bounds).pace_left_s == pytest.approx(0.025)
    # Prompts in the batch count as well.
    prompt = request("p", 0, computed=600, prompt=1000)
    assert work(Progress(), *running, prompt, bounds=bounds).pace_left_s == pytest.approx(0.02)
