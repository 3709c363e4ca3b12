"""What a step may be, against the latency model and a search by trying every size."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.policies.latency import StepCosts
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.steps import (
    CACHE,
    FIRST_TOKEN,
    IN_TIME,
    LIMIT_NAMES,
    MARGIN,
    PACE,
    StepBounds,
    StepTerms,
    StepWork,
    choose,
    cut,
    fitting,
    from_limits,
    latest_first_token_s,
    pace_of,
    to_limits,
)

COSTS = latency_model().costs
SLOW, FAST = (
    StepTerms(*(getattr(COSTS[mode], term) for term in StepTerms._fields)) for mode in ("fp16", "fp8")
)
BOUNDS = StepBounds(
    pace_s=0.0264,
    tpot_s=0.033,
    ttft_s=0.7,
    late_s=1.0,
    least_tokens=256.0,
    light_ttft_s=0.8,
    given_up_s=1.5,
    light_s=0.0,
    heavy_s=0.0,
)
"""Every batch is heavy."""
MOST = 2048


def work(
    decoding: tuple[tuple[int, float], ...] = (),
    prompts: tuple[tuple[int, int, float], ...] = (),
    **changes: Any,
) -> StepWork:
    """Decoding requests as (made, since), prompts as (tokens left, tokens computed, age)."""
    left, computed, ages = zip(*prompts, strict=True) if prompts else ((), (), ())
    paced = [made * BOUNDS.pace_s - since for made, since in decoding]
    met = [made * BOUNDS.tpot_s - since for made, since in decoding if made * BOUNDS.tpot_s > since]
    given = {
        "pace_left_s": min(paced, default=math.inf),
        "slo_left_s": min(met, default=math.inf),
        "prompt_tokens": left,
        "prompt_context": computed,
        "prompt_age_s": ages,
        "decodes": len(decoding),
        "requests": len(decoding),
        "context": 1000.0 * len(decoding),
        "most_tokens": MOST,
        "crowded": False,
    }
    return StepWork(**{**given, **changes})


def step_s(costs: StepCosts, tokens: int, todo: StepWork) -> float:
    """What the latency model says of a step of `tokens`, prompts in their order."""
    room, pairs = tokens - todo.decodes, 0.0
    for left, computed in zip(todo.prompt_tokens, todo.prompt_context, strict=True):
        taken = min(left, max(0, room))
        room -= taken
        # As if the rest of the prompt were computed in this step, too: no less than what it takes.
        pairs += taken * (computed + 0.5 * left)
    return float(costs.step_s(tokens, todo.requests, todo.context, pairs))


works = st.builds(
    work,
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.0, 1.0)), max_size=20).map(tuple),
    st.lists(
        st.tuples(st.integers(1, 3000), st.integers(0, 3000), st.floats(0.0, 2.0)), min_size=1, max_size=6
    ).map(tuple),
)


@given(works, st.floats(0.0, 0.2))
def test_as_many_tokens_fit_as_the_latency_model_has_time_for(todo: StepWork, seconds: float) -> None:
    there = todo.decodes + int(sum(todo.prompt_tokens))
    sizes = range(todo.decodes, min(MOST, there) + 1)
    best = max((size for size in sizes if step_s(COSTS["fp16"], size, todo) <= seconds + 1e-12), default=0)
    found = fitting(seconds, SLOW, todo)
    if best == sizes[-1]:
        assert found == MOST
    elif best == 0:
        assert found in (0.0, todo.decodes)
    else:
        assert best <= found + 1e-6 < best + 1 + 1e-6


def test_limits_are_read_as_they_were_written() -> None:
    terms = {"fp16": SLOW, "fp8": FAST}
    limits = to_limits(BOUNDS, terms)
    assert tuple(limits) == LIMIT_NAMES
    assert limits["fp8_token_s"] == FAST.token_s
    assert from_limits(limits) == (BOUNDS, terms)
    with pytest.raises(KeyError, match="fp16_pair_s"):
        from_limits({name: value for name, value in limits.items() if name != "fp16_pair_s"})


def test_what_nobody_waits_for_takes_a_full_step_in_16_bits() -> None:
    assert choose(BOUNDS, SLOW, FAST, work(prompts=((9000, 0, 0.01),))) == (MOST, IN_TIME, 0.0)
    assert choose(BOUNDS, SLOW, FAST, work())[:2] == (MOST, IN_TIME)


def test_a_step_is_cut_to_the_pace_of_the_request_that_is_furthest_behind() -> None:
    """A first token was just given: the next is due a pace later, and a full step takes 51 ms."""
    todo = work(((1, 0.0), (30, 0.4)), ((4000, 0, 0.05),))
    tokens, why, _ = choose(BOUNDS, SLOW, FAST, todo)
    assert why == IN_TIME
    assert 800 < tokens < 1000
    assert step_s(COSTS["fp16"], tokens, todo) <= MARGIN * BOUNDS.pace_s
    assert step_s(COSTS["fp16"], tokens + 8, todo) > MARGIN * BOUNDS.pace_s
    # With time in hand the step is longer.
    assert choose(BOUNDS, SLOW, FAST, work(((2, 0.0),), ((4000, 0, 0.05),)))[0] > 1.8 * tokens


def test_fp8_is_taken_where_16_bits_would_compute_too_little() -> None:
    behind = ((10, 0.257),)
    tokens, why, fit = choose(BOUNDS, SLOW, FAST, work(behind, ((4000, 0, 0.05),)))
    assert (why, fit) == (PACE, pytest.approx(0.0, abs=256.0))
    # An FP8 step has the time that the SLO leaves: 10 tokens are due after 330 ms.
    assert tokens == MOST
    # Without a prompt, or with a short one, there is less to compute and 16 bits do.
    assert choose(BOUNDS, SLOW, FAST, work(((10, 0.254),)))[1] == IN_TIME


def test_an_fp8_step_is_cut_to_what_the_slo_leaves() -> None:
    todo = work(((1, 0.003),), ((4000, 0, 0.95),))
    tokens, why, ttft = choose(BOUNDS, SLOW, FAST, todo)
    assert why == FIRST_TOKEN
    assert ttft > BOUNDS.ttft_s
    assert step_s(COSTS["fp8"], tokens, todo) <= MARGIN * (0.033 - 0.003)
    assert tokens < MOST


def test_a_step_is_not_cut_below_the_least() -> None:
    late = work(((1, 0.03),), ((4000, 0, 0.05),))
    assert cut(BOUNDS, FAST, late) == 1 + 256
    assert cut(BOUNDS._replace(least_tokens=math.inf), FAST, late) == MOST


@pytest.mark.parametrize("age_s", [0.0, 0.2, 0.4, 0.6, 0.69, 0.9])
def test_a_prompt_waits_for_16_bits_as_long_as_fp8_would_still_be_in_time(age_s: float) -> None:
    """A queue of 12,000 tokens takes FP8 0.18 s from the next step on."""
    todo = work(prompts=((12_000, 0, age_s),))
    predicted = latest_first_token_s(MOST, BOUNDS, SLOW, FAST, todo)
    # By the latency model: one full step in 16 bits, the rest in full FP8 steps.
    pairs = 6000.0 * MOST
    steps = 1 + (12_000 - MOST) / MOST
    by_steps = float(COSTS["fp16"].step_s(MOST, 0, 0, pairs)) + (steps - 1) * float(
        COSTS["fp8"].step_s(MOST, 0, 0, pairs)
    )
    assert predicted == pytest.approx(age_s + by_steps, rel=1e-9)
    assert choose(BOUNDS, SLOW, FAST, todo)[1] == (FIRST_TOKEN if age_s + by_steps > 0.7 else IN_TIME)


def test_prompts_wait_for_those_before_them() -> None:
    alone = latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=((500, 0, 0.1),)))
    queue = ((9000, 0, 0.1), (500, 0, 0.1))
    behind = latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=queue))
    first = latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=queue[:1]))
    assert alone < first < behind


def test_a_prompt_that_is_late_asks_for_nothing_but_is_still_in_the_way() -> None:
    late = ((9000, 0, 1.1),)
    assert latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=late)) == 0.0
    assert choose(BOUNDS, SLOW, FAST, work(prompts=late))[1] == IN_TIME
    fresh = ((500, 0, 0.1),)
    both = latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=late + fresh))
    assert both > latest_first_token_s(MOST, BOUNDS, SLOW, FAST, work(prompts=fresh))


def test_decoding_requests_alone_can_be_too_many_for_the_time_left() -> None:
    """600 tokens take 16 bits 14 ms without reading anything."""
    many = ((1, 0.0164),) * 600
    todo = work(many, requests=0, context=0.0)
    assert fitting(0.010, SLOW, todo) == 0.0
    assert choose(BOUNDS, SLOW, FAST, todo)[1] == PACE


def test_a_full_cache_asks_for_fp8() -> None:
    assert choose(BOUNDS, SLOW, FAST, work(crowded=True)) == (MOST, CACHE, 0.0)


@given(works, st.sampled_from([0.0, 256.0, math.inf]))
def test_a_step_never_exceeds_the_engine_and_serves_every_decoding_request(
    todo: StepWork, least: float
) -> None:
    bounds = BOUNDS._replace(least_tokens=least)
    tokens, why, _ = choose(bounds, SLOW, FAST, todo)
    assert todo.decodes <= tokens <= MOST
    assert why in (PACE, FIRST_TOKEN, IN_TIME)


@given(works)
def test_a_step_in_16_bits_keeps_every_pace_and_every_first_token(todo: StepWork) -> None:
    tokens, why, _ = choose(BOUNDS, SLOW, FAST, todo)
    if why != IN_TIME:
        return
    there = todo.decodes + sum(todo.prompt_tokens)
    taken = min(tokens, int(there))
    assert step_s(COSTS["fp16"], taken, todo) <= todo.pace_left_s + 1e-9
    assert latest_first_token_s(tokens, BOUNDS, SLOW, FAST, todo) <= BOUNDS.ttft_s


def test_the_pace_falls_from_the_limit_of_a_light_batch_to_that_of_a_heavy_one() -> None:
    """FP8 takes 1.7 ms, 14 us a request and 46 ns a token of context at any size of the step."""
    bounds = BOUNDS._replace(light_s=0.0033, heavy_s=0.0066)
    paces = [pace_of(bounds, FAST, count, 1000.0 * count) for count in (0, 20, 50, 90, 500)]
    assert paces[:2] == [bounds.tpot_s] * 2
    assert paces[3:] == [bounds.pace_s] * 2
    taken_s = 1.7e-3 + 50 * (14e-6 + 1000 * FAST.context_token_s)
    share = (taken_s - 0.0033) / 0.0033
    assert 0.0 < share < 1.0
    assert paces[2] == pytest.approx(0.033 - share * (0.033 - 0.0264))
    assert pace_of(BOUNDS, FAST, 0, 0.0) == BOUNDS.pace_s, "every batch is heavy"


@pytest.mark.parametrize(
    ("ttft_s", "heavy", "why"),
    [
        (0.65, True, IN_TIME),
        (0.75, True, FIRST_TOKEN),
        (0.75, False, IN_TIME),
        (0.85, False, FIRST_TOKEN),
    ],
)
def test_before_a_light_batch_a_prompt_waits_longer_for_16_bits(ttft_s: float, heavy: bool, why: int) -> None:
    bounds = BOUNDS if heavy else BOUNDS._replace(light_s=0.01, heavy_s=0.02)
    taken_s = latest_first_token_s(MOST, bounds, SLOW, FAST, work(prompts=((12_000, 0, 0.0),)))
    assert choose(bounds, SLOW, FAST, work(prompts=((12_000, 0, ttft_s - taken_s),)))[1] == why


def test_what_fp8_would_serve_far_too_late_is_given_up_unless_the_batch_is_heavy() -> None:
    light = BOUNDS._replace(light_s=0.01, heavy_s=0.02)
    hopeless = work(prompts=((120_000, 0, 0.1),))
    assert latest_first_token_s(MOST, BOUNDS, SLOW, FAST, hopeless) > BOUNDS.given_up_s
    assert choose(BOUNDS, SLOW, FAST, hopeless)[1] == FIRST_TOKEN
    assert choose(light, SLOW, FAST, hopeless)[1] == IN_TIME
    # What stands before it and can be in time asks for FP8 as ever.
    both = work(prompts=((12_000, 0, 0.7), (120_000, 0, 0.1)))
    _, why, ttft_s = choose(light, SLOW, FAST, both)
    assert why == FIRST_TOKEN
    assert 0.8 < ttft_s < 1.0
