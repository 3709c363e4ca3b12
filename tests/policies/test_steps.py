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
    to_limits,
)

COSTS = latency_model().costs
SLOW, FAST = (
    StepTerms(*(getattr(COSTS[mode], term) for term in StepTerms._fields)) for mode in ("fp16", "fp8")
)
BOUNDS = StepBounds(pace_s=0.0264, tpot_s=0.033, ttft_s=0.7, late_s=1.0, least_tokens=256.0)
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
