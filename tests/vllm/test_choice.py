import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.policies.steps import LIMIT_NAMES, StepBounds, StepTerms
from nestedfp.vllm.choice import Choice, Limits, StepFacts, choose

QUIET = StepFacts(tokens=8, waiting=0, kv_usage=0.1)
LIMITS = Limits(min_steps=3)
BOUNDED: dict[str, float] = {name: float(place) for place, name in enumerate(LIMIT_NAMES)}


@pytest.mark.parametrize(
    ("facts", "signal"),
    [
        (StepFacts(1024, 0, 0.1), "tokens 1024 >= 1024"),
        (StepFacts(8, 4, 0.1), "waiting 4 >= 4"),
        (StepFacts(8, 0, 0.9), "kv_usage 0.9 >= 0.9"),
    ],
)
def test_any_high_mark_brings_fp8_and_is_named(facts: StepFacts, signal: str) -> None:
    chosen = choose(facts, Choice(), LIMITS)
    assert chosen.fp8
    assert chosen.reason == f"auto: {signal}"


def test_between_the_marks_nothing_changes() -> None:
    between = StepFacts(tokens=500, waiting=2, kv_usage=0.8)
    assert not choose(between, Choice(), LIMITS).fp8
    assert choose(between, Choice(fp8=True, steps=100), LIMITS).fp8


def test_one_signal_above_its_low_mark_holds_fp8() -> None:
    held = Choice(fp8=True, steps=100)
    assert choose(StepFacts(8, 1, 0.1), held, LIMITS).fp8
    assert not choose(QUIET, held, LIMITS).fp8


def test_fp8_is_kept_for_min_steps() -> None:
    choice = choose(StepFacts(2000, 0, 0.1), Choice(), LIMITS)
    kept = 1
    while (choice := choose(QUIET, choice, LIMITS)).fp8:
        kept += 1
    assert kept == LIMITS.min_steps


@given(
    st.lists(
        st.builds(
            StepFacts,
            tokens=st.integers(1, 8192),
            waiting=st.integers(0, 50),
            kv_usage=st.floats(0, 1),
        ),
        max_size=200,
    )
)
def test_every_run_of_fp8_lasts_min_steps(steps: list[StepFacts]) -> None:
    choice, runs = Choice(), [0]
    for facts in steps:
        choice = choose(facts, choice, LIMITS)
        if choice.fp8:
            runs[-1] += 1
        elif runs[-1]:
            runs.append(0)
    assert all(length >= LIMITS.min_steps for length in runs[:-1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokens": 3}, "unknown name 'tokens'"),
        ({"tokens_high": "many"}, "tokens_high is 'many'"),
        ({"kv_high": float("nan")}, "kv_high is nan"),
        ({"tokens_high": 10, "tokens_low": 20}, "expected 0 <= low <= high"),
        ({"min_steps": 0}, "min_steps is 0"),
        ({"waiting_prompt_tokens": -1}, "waiting_prompt_tokens is -1"),
        ({**BOUNDED, "tpot_s": -0.1}, "tpot_s is -0.1"),
        ({"pace_s": 0.03}, "tpot_s is not given, but pace_s is; give all or none"),
        ({**BOUNDED, "fp8_speed_s": 1.0}, "unknown name 'fp8_speed_s'"),
    ],
)
def test_bad_limits_are_named(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limits.from_dict(data)


def test_bounds_are_read_by_their_flat_names() -> None:
    limits = Limits.from_dict({**BOUNDED, "kv_high": 0.8})
    assert limits.steps is not None
    assert limits.steps.bounds == StepBounds(*(BOUNDED[name] for name in StepBounds._fields))
    for precision, terms in limits.steps.terms.items():
        assert terms == StepTerms(*(BOUNDED[f"{precision}_{term}"] for term in StepTerms._fields))
    assert set(limits.steps.terms) == {"fp16", "fp8"}
    assert limits.kv_high == 0.8
    assert Limits.from_dict({"kv_high": 0.8}).steps is None
