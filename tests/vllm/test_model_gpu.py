"""A real model on a GPU: tokens like plain vLLM's, and the same after flips, sleep and a reload."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from greedy_reference import PROMPTS, Greedy, completion, engine_settings, sampling

from nestedfp.vllm import engine_arguments

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(600)]

NEAR_TIE = 0.0625
"""Logits near 20 are 1/64 apart in float16; two of them, each a few roundings off, may change places."""


@pytest.fixture(scope="module")
def plain(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    out = tmp_path_factory.mktemp("plain") / "greedy.json"
    program = Path(__file__).with_name("greedy_reference.py")
    process = subprocess.Popen(
        [sys.executable, str(program), model_path, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def results() -> list[Greedy]:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors.decode()[-2000:]
        return [Greedy(**entry) for entry in json.loads(out.read_text())]

    yield results
    process.kill()


@pytest.fixture(scope="module")
def llm(plain: Any, model_path: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from vllm import LLM

        import nestedfp.vllm

        nestedfp.vllm.register()
        settings = {**engine_settings(model_path), "enforce_eager": False, "enable_sleep_mode": True}
        settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
        yield LLM(**settings, **engine_arguments("cuda", check_steps=True))


def greedy(llm: Any) -> list[Greedy]:
    from vllm import SamplingParams

    params = SamplingParams(**sampling())
    return [completion(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]) for prompt in PROMPTS]


def control(llm: Any, command: str, **arguments: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.nestedfp_control({"command": command, **arguments})


@pytest.fixture(scope="module")
def first(llm: Any) -> list[Greedy]:
    return greedy(llm)


def test_tokens_in_16_bits_equal_plain_vllm_but_for_near_ties(
    first: list[Greedy], plain: Any, record_property: Any
) -> None:
    near_ties = 0
    for prompt, ours, theirs in zip(PROMPTS, first, plain(), strict=True):
        for position, (mine, other) in enumerate(zip(ours.token_ids, theirs.token_ids, strict=True)):
            if mine != other:
                lead = max(ours.leads[position], theirs.leads[position])
                assert lead <= NEAR_TIE, f"{prompt!r} differs at {position}, where the best led by {lead}"
                near_ties += 1
                break
    record_property("completions", len(PROMPTS))
    record_property("near_ties", near_ties)
    print(f"{len(PROMPTS) - near_ties} of {len(PROMPTS)} completions equal, {near_ties} part at a near tie")
    assert near_ties <= len(PROMPTS) // 4


def test_tokens_are_the_same_after_flips(llm: Any, first: list[Greedy]) -> None:
    for mode in ("fp8", "fp16", "fp8"):
        control(llm, "set_target", mode=mode, epoch=0)
        greedy(llm)
    control(llm, "set_target", mode="fp16", epoch=0)
    assert greedy(llm) == first
    status = control(llm, "status")["result"]
    assert status["flips"] >= 4
    assert status["mixed_steps"] == 0


def test_sleep_and_wake_up_keep_the_weights(llm: Any, first: list[Greedy]) -> None:
    llm.sleep(level=1)
    llm.wake_up()
    assert greedy(llm) == first


def test_reloading_the_checkpoint_changes_no_token(llm: Any, first: list[Greedy]) -> None:
    llm.collective_rpc("reload_weights")
    assert greedy(llm) == first
