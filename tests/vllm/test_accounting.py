import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.vllm.accounting import RequestTokens, StepCounts
from nestedfp.vllm.step import StepReport, StepTag


@pytest.mark.parametrize(
    ("internal", "client"),
    [
        (["chatcmpl-8f3a-0123abcd"], "chatcmpl-8f3a"),
        (["cmpl-8f3a-0-0123abcd", "cmpl-8f3a-1-1123abcd"], "cmpl-8f3a"),
        (["0_chatcmpl-8f3a-0123abcd", "1_chatcmpl-8f3a-0123abcd"], "chatcmpl-8f3a"),
        (["plain"], "plain"),
    ],
)
def test_tokens_are_found_under_the_id_that_the_client_sees(internal: list[str], client: str) -> None:
    tokens = RequestTokens()
    for request_id in internal:
        tokens.open(request_id)
    tokens.add(dict.fromkeys(internal, 3), "fp16")
    tokens.add({internal[0]: 2}, "fp8")
    assert tokens.take(client) == {"fp16": 3 * len(internal), "fp8": 2}
    assert tokens.take(client) is None


def test_a_taken_request_is_not_opened_again_by_a_late_step() -> None:
    tokens = RequestTokens()
    tokens.open("cmpl-1")
    tokens.take("cmpl-1")
    tokens.add({"cmpl-1": 1}, "fp16")
    assert tokens.take("cmpl-1") is None


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abcdx"), st.integers(1, 40)),
            st.sampled_from(["fp16", "fp8", "mlp"]),
        ),
        max_size=30,
    )
)
def test_every_token_of_an_open_request_is_counted_once(steps: list[tuple[dict[str, int], str]]) -> None:
    """`x` was taken before: its late steps count for nothing."""
    tokens = RequestTokens()
    expected: dict[str, dict[str, int]] = {name: {"fp16": 0, "fp8": 0} for name in "abcd"}
    for name in "abcdx":
        tokens.open(name)
    tokens.take("x")
    for scheduled, plan in steps:
        tokens.add(scheduled, plan)
        for name, count in scheduled.items():
            if name in expected:
                expected[name][plan] = expected[name].get(plan, 0) + count
    assert {name: tokens.take(name) for name in "abcd"} == expected
    assert tokens.take("x") is None


@given(st.lists(st.tuples(st.sampled_from("ot"), st.integers(0, 30)), max_size=300))
def test_the_store_is_bounded_and_forgets_whole_requests(moves: list[tuple[str, int]]) -> None:
    tokens, open_ids = RequestTokens(capacity=8), []
    for move, number in moves:
        request_id = f"cmpl-x{number}-0-0123abcd"
        if move == "o":
            tokens.open(request_id)
            if request_id not in open_ids:
                open_ids = [*open_ids, request_id][-8:]
        else:
            found = tokens.take(f"cmpl-x{number}")
            assert (found is not None) == (request_id in open_ids)
            open_ids = [entry for entry in open_ids if entry != request_id]
    for request_id in open_ids:
        assert tokens.take(request_id) is not None
    assert not tokens._ids


def step(counts: StepCounts, plan: str, at: float, *, ran: str = "", mismatches: int | None = None) -> None:
    tag = StepTag(plan, f"because {plan}", at)
    report = StepReport(ran or plan, 0.001 if plan != counts.current else None, mismatches)
    counts.add(tag, report, 10, at + 0.5)


def test_flips_are_counted_from_executed_steps() -> None:
    counts = StepCounts(["fp16", "fp8"])
    for second, plan in enumerate(["fp16", "fp8", "fp8", "fp16"]):
        step(counts, plan, float(second))
    assert counts.flips == 2
    assert counts.steps == {"fp16": 2, "fp8": 2}
    assert counts.tokens == {"fp16": 20, "fp8": 20}
    assert (counts.last_flip_reason, counts.last_flip_seconds) == ("because fp16", 0.001)
    assert counts.mixed_steps is None


def test_mixed_steps_are_layers_that_differ_or_a_worker_that_did() -> None:
    counts = StepCounts(["fp16", "fp8"])
    step(counts, "fp8", 0.0, mismatches=0)
    assert counts.mixed_steps == 0
    step(counts, "fp8", 1.0, mismatches=1)
    step(counts, "fp8", 2.0, ran="fp16", mismatches=0)
    assert counts.mixed_steps == 2


def test_the_time_of_overlapping_steps_is_not_counted_twice() -> None:
    counts = StepCounts(["fp16", "fp8"])
    for number in range(4):
        counts.add(StepTag("fp16", "", 0.1 * number), StepReport("fp16", None, None), 1, 1.0 + number)
    assert counts.step_time_s["fp16"] == pytest.approx(1.0)


def test_tokens_are_averaged_over_the_same_steps_as_times() -> None:
    """So that a step time that is linear in tokens stays so in the averages."""
    counts = StepCounts(["fp16", "fp8"])
    now = 0.0
    for tokens in (8, 512, 64, 1, 2048):
        now += 0.004 + 1e-5 * tokens
        counts.add(StepTag("fp16", "", 0.0), StepReport("fp16", None, None), tokens, now)
    assert counts.batch_tokens["fp8"] is None
    mean_tokens, mean_s = counts.batch_tokens["fp16"], counts.step_time_s["fp16"]
    assert mean_tokens is not None
    assert mean_s is not None
    assert 8 < mean_tokens < 2048
    assert mean_s == pytest.approx(0.004 + 1e-5 * mean_tokens)
