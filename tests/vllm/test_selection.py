import pytest

from nestedfp.vllm.choice import StepFacts
from nestedfp.vllm.selection import PlanSelection
from nestedfp.vllm.settings import Settings

BUSY = StepFacts(tokens=4096, waiting=9, kv_usage=0.5)
SETTINGS = Settings.from_dict({"plans": {"mlp": ["gate_up_proj", "down_proj"]}})


def select(selection: PlanSelection, *request_ids: str) -> tuple[str, str]:
    return selection.select(dict.fromkeys(request_ids, 1), lambda: BUSY)


def test_a_target_holds_from_the_next_step() -> None:
    selection = PlanSelection(SETTINGS)
    assert select(selection, "a") == ("fp16", "target at start")
    selection.set_target("fp8", 3, "queue")
    assert select(selection, "a") == ("fp8", "target fp8: queue")
    selection.set_target("mlp", 4)
    assert select(selection, "a") == ("mlp", "target mlp")


def test_only_steps_that_hold_a_strict_request_are_pinned() -> None:
    selection = PlanSelection(SETTINGS)
    selection.set_target("fp8", 1)
    selection.pin("strict")
    assert select(selection, "a", "strict") == ("fp16", "strict request in the step")
    assert select(selection, "a")[0] == "fp8"
    assert selection.strict_count == 1
    selection.unpin({"strict", "a"})
    assert select(selection, "a", "strict")[0] == "fp8"


def test_auto_follows_the_facts_and_starts_anew_with_the_mode() -> None:
    selection = PlanSelection(SETTINGS)
    selection.set_target("auto", 1, limits={"waiting_high": 9, "tokens_high": 9999})
    assert select(selection, "a") == ("fp8", "auto: waiting 9 >= 9")
    selection.set_target("fp16", 2)
    selection.set_target("auto", 3, limits={"waiting_high": 99, "tokens_high": 9999})
    assert select(selection, "a")[0] == "fp16"


@pytest.mark.parametrize("mode", ["auto", "fp8"])
def test_limits_hold_for_the_target_that_they_came_with(mode: str) -> None:
    configured = Settings.from_dict({"limits": {"waiting_high": 7}})
    selection = PlanSelection(configured)
    selection.set_target(mode, 1, limits={"tokens_high": 9999})
    assert (selection.limits.tokens_high, selection.limits.waiting_high) == (9999, 7)
    selection.set_target(mode, 2, limits={"kv_high": 0.8})
    assert (selection.limits.tokens_high, selection.limits.kv_high) == (configured.limits.tokens_high, 0.8)
    selection.set_target(mode, 3)
    assert selection.limits == configured.limits


def test_the_same_target_again_keeps_the_choice() -> None:
    selection = PlanSelection(SETTINGS)
    for _ in range(2):
        selection.set_target("auto", 1, limits={"waiting_high": 9, "tokens_high": 9999})
        assert select(selection, "a") == ("fp8", "auto: waiting 9 >= 9")


def test_an_old_epoch_is_refused_and_a_repeated_one_is_not() -> None:
    selection = PlanSelection(SETTINGS)
    selection.set_target("fp8", 5)
    selection.set_target("fp8", 5)
    with pytest.raises(ValueError, match="epoch is 4, but 5"):
        selection.set_target("fp16", 4)
    assert (selection.mode, selection.epoch) == ("fp8", 5)


def test_a_refused_target_leaves_the_old_one() -> None:
    selection = PlanSelection(SETTINGS)
    with pytest.raises(ValueError, match=r"mode is 'fp4', expected one of \['fp16', 'fp8', 'mlp', 'auto'\]"):
        selection.set_target("fp4", 1)
    with pytest.raises(ValueError, match="unknown name 'speed'"):
        selection.set_target("auto", 1, limits={"speed": 1})
    assert (selection.mode, selection.epoch) == ("fp16", 0)
