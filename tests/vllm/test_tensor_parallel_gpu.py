"""Two GPUs of one host: the ranks never differ, and the model is the one that a single GPU runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tensor_parallel
import torch

from nestedfp.vllm.bench.models import random_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

RANKS = 2
FLIPS = 10_000
TOLERANCE = {"fp16": 0.02, "fp8": 0.2}
"""Of a log-probability: sums in another order, and activations that each rank quantises by itself."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    dtype = getattr(torch, tensor_parallel.task("", 1)["dtype"])
    return str(random_checkpoint("llama-tiny", dtype, folder))


@pytest.fixture(scope="module")
def single(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The scores of one GPU, awaited: its process runs while the other engine starts."""
    out = tmp_path_factory.mktemp("single") / "scores.json"
    program = str(Path(tensor_parallel.__file__))
    process = subprocess.Popen(
        [sys.executable, program, model, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )

    def results() -> dict[str, list[float]]:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors.decode()[-3000:]
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found

    yield results
    process.kill()


@pytest.fixture(scope="module")
def engine(single: Any, model: str) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # The tests asked this process for its devices: a fork of it cannot use them.
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        from nestedfp.vllm.bench.engine import Engine

        engine = Engine(tensor_parallel.task(model, RANKS), check_steps=True)
        yield engine
        engine.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def before(engine: Any) -> dict[str, list[float]]:
    found = {}
    for mode in ("fp8", "fp16"):
        engine.set_mode(mode)
        found[mode] = tensor_parallel.scores(engine)
    return found


@pytest.fixture(scope="module")
def of_one_gpu(before: Any, single: Any) -> dict[str, list[float]]:
    """Asked for once the other engine has started."""
    found: dict[str, list[float]] = single()
    return found


def ranks(engine: Any) -> list[dict[str, int]]:
    """What each rank says it ran."""
    found: list[dict[str, int]] = engine.core.model_executor.collective_rpc("checked_steps")
    return found


@pytest.mark.parametrize("mode", ["fp16", "fp8"])
def test_logits_are_those_of_one_gpu(
    before: dict[str, list[float]], of_one_gpu: dict[str, list[float]], mode: str, record_property: Any
) -> None:
    compared = zip(before[mode], of_one_gpu[mode], tensor_parallel.prompt_positions(), strict=True)
    differences = [abs(one - other) for one, other, of_prompt in compared if of_prompt]
    record_property(f"{mode}_largest_difference", round(max(differences), 5))
    record_property(f"{mode}_mean_difference", round(fmean(differences), 6))
    assert max(differences) <= TOLERANCE[mode]


def test_ten_thousand_flips_under_load_leave_the_ranks_alike(
    engine: Any, before: dict[str, list[float]], record_property: Any
) -> None:
    from vllm import SamplingParams

    llm, selection = engine.llm.llm_engine, engine.core.scheduler.selection
    start = engine.control("status")
    wanted: dict[str, int] = {}
    finished: dict[str, int] = {}
    steps = 0
    while steps < FLIPS or llm.has_unfinished_requests():
        while steps < FLIPS and len(wanted) - len(finished) < 24:
            name = f"load-{len(wanted)}"
            wanted[name] = 20 + 37 * len(wanted) % 400
            params = SamplingParams(
                temperature=0.0, max_tokens=wanted[name], ignore_eos=True, detokenize=False
            )
            llm.add_request(name, engine.prompts(5 + 61 * len(wanted) % 300, 1)[0], params)
        selection.set_target(("fp8", "fp16")[steps % 2], 0)
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
    engine.set_mode("fp16")
    end, answers = engine.control("status"), ranks(engine)
    found = {
        "ranks": len(answers),
        "flips": end["flips"] - start["flips"],
        "requests": len(wanted),
        "failed_requests": len(wanted.items() - finished.items()),
        "mixed_steps": end["mixed_steps"],
        "ranks_alike": int(len({str(answer) for answer in answers}) == 1),
        "checked_steps": answers[0]["steps"],
    }
    for name, value in found.items():
        record_property(name, value)
    print(found, answers)
    assert len(answers) == RANKS
    assert answers == [answers[0]] * RANKS
    assert answers[0]["steps"] >= FLIPS
    assert answers[0]["mixed"] == 0
    assert finished == wanted
    assert found["flips"] >= FLIPS - 10
    assert found["mixed_steps"] == 0


def test_logits_in_16_bits_keep_their_bits_over_the_flips(
    engine: Any, before: dict[str, list[float]], record_property: Any
) -> None:
    engine.set_mode("fp16")
    after = tensor_parallel.scores(engine)
    record_property("logits_equal", int(after == before["fp16"]))
    assert after == before["fp16"]
    assert after != before["fp8"]


def test_every_layer_is_nested_and_every_mlp_fused_and_both_families_are_captured(engine: Any) -> None:
    status = engine.control("status")
    assert status["layers"] == {"nested": 16, "plain": 0}
    assert (status["fused_mlps"], status["unfused_reasons"]) == (4, {})
    assert set(status["graphs"]) == {"fp16", "fp8"}
