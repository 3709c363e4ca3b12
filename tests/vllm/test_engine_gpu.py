"""The plugin on a GPU, with CUDA graphs and random weights, every step checked on the device.

NESTEDFP_TEST_MODEL and NESTEDFP_TEST_DTYPE choose the model and its dtype, vLLM's own
VLLM_USE_V2_MODEL_RUNNER the runner: `bench/engine_tests.py` runs it for all and records what it found.
"""

import os
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import pytest
import torch
from safetensors import safe_open

from nestedfp.vllm.bench.models import CONFIGURATIONS, model_folder, random_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(600)]

SMALL = "llama-tiny"
MODEL = os.environ.get("NESTEDFP_TEST_MODEL", SMALL)
DTYPE = os.environ.get("NESTEDFP_TEST_DTYPE", "float16")
CAPTURED = [1, 2, 4, 8, 32] if MODEL == SMALL else [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
FLIPS = 10_000

only_small = pytest.mark.skipif(MODEL != SMALL, reason="the weights of a large model are in no file")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    task = {"engine": "nestedfp", "dtype": DTYPE, "device": "cuda", "blocks": 4096}
    task["capture_sizes"] = CAPTURED
    task["settings"] = {"enable_sleep_mode": True}
    if MODEL == SMALL:
        task |= {"model": str(random_checkpoint(MODEL, getattr(torch, DTYPE), folder)), "load_format": "auto"}
    else:
        task["model"] = str(model_folder(MODEL, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from nestedfp.vllm.bench.engine import Engine

        yield Engine(task, check_steps=True, plans=["mlp"])


@pytest.fixture(scope="module", autouse=True)
def no_compilation_in_service(engine: Any) -> Any:
    """Nothing is compiled while the tests below run: all kernels were compiled before the start ended."""
    from triton import knobs

    from nestedfp.kernels.hopper.cuda import compile as nvrtc

    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **facts: compiled.append(facts["fn"].name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "_compile", lambda source, *_: compiled.append(source))
        yield
    knobs.runtime.jit_post_compile_hook = None
    assert [name for name in compiled if "gemm" in name or "quantize" in name] == []


@only_small
def test_a_flip_before_every_step_mixes_nothing_and_changes_no_token(engine: Any) -> None:
    checks = engine.check_flips()
    assert checks["fp16_tokens_equal_after_flips"]
    assert checks["mixed_steps"] == 0
    assert checks["flips"] >= checks["steps"] - 2
    assert checks["flip_us_p99"] < 1000


class Logits:
    """Keeps a copy of all logits that the engine computes."""

    def __init__(self, engine: Any) -> None:
        self._model = engine.worker.model_runner.get_model()
        self._compute = self._model.compute_logits
        self.kept: list[torch.Tensor] = []

    def __enter__(self) -> list[torch.Tensor]:
        def compute(*args: Any, **kwargs: Any) -> Any:
            logits = self._compute(*args, **kwargs)
            self.kept.append(logits.clone())
            return logits

        self._model.compute_logits = compute
        return self.kept

    def __exit__(self, *_: object) -> None:
        del self._model.compute_logits


def greedy_logits(engine: Any, prompts: list[Any]) -> list[torch.Tensor]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    with Logits(engine) as kept:
        engine.llm.generate(prompts, params, use_tqdm=False)
    return kept


def test_logits_in_16_bits_keep_their_bits_over_flips_in_every_captured_size_and_eager(
    engine: Any, record_property: Any
) -> None:
    """The prompts of the largest batches and, with few captured sizes, a decode step run without a graph."""
    eager = [48] if MODEL == SMALL else []
    prompts = {size: engine.prompts(16, size) for size in [*CAPTURED, *eager]}
    assert 16 * max(prompts) > max(CAPTURED)
    engine.set_mode("fp16")
    before = {size: greedy_logits(engine, group) for size, group in prompts.items()}
    for mode in ("fp8", "mlp", "fp8"):
        engine.set_mode(mode)
        changed = {size: greedy_logits(engine, group) for size, group in prompts.items()}
        for size, logits in changed.items():
            assert not torch.equal(logits[0], before[size][0]), "another plan gives other logits"
    engine.set_mode("fp16")
    unlike = []
    for size, group in prompts.items():
        after = greedy_logits(engine, group)
        assert len(after) == len(before[size]) >= 5
        assert all(logits.shape[0] >= size for logits in after[1:])
        if not all(torch.equal(ours, first) for ours, first in zip(after, before[size], strict=True)):
            unlike.append(size)
    record_property("sizes_with_equal_logits", len(prompts) - len(unlike))
    record_property("sizes", len(prompts))
    assert unlike == []


def test_ten_thousand_flips_under_load_fail_no_request_and_mix_no_step(
    engine: Any, record_property: Any
) -> None:
    from vllm import SamplingParams

    llm, selection = engine.llm.llm_engine, engine.core.scheduler.selection
    before = engine.control("status")
    wanted: dict[str, int] = {}
    finished: dict[str, int] = {}
    costs: list[float] = []
    steps, started = 0, time.monotonic()
    while steps < FLIPS or llm.has_unfinished_requests():
        while steps < FLIPS and len(wanted) - len(finished) < 24:
            name = f"load-{len(wanted)}"
            wanted[name] = 20 + 37 * len(wanted) % 400
            length = 5 + 61 * len(wanted) % 300
            params = SamplingParams(
                temperature=0.0, max_tokens=wanted[name], ignore_eos=True, detokenize=False
            )
            llm.add_request(name, engine.prompts(length, 1)[0], params)
        selection.set_target(("fp8", "fp16", "mlp")[steps % 3], 0)
        for output in llm.step():
            if output.finished:
                finished[output.request_id] = len(output.outputs[0].token_ids)
        steps += 1
        costs.append(engine.core.scheduler.counts.last_flip_seconds or 0.0)
    after = engine.control("status")
    engine.set_mode("fp16")
    found = {
        "flips": after["flips"] - before["flips"],
        "requests": len(wanted),
        "failed_requests": len(wanted.items() - finished.items()),
        "mixed_steps": after["mixed_steps"] - before["mixed_steps"],
        "flip_us_p99": round(1e6 * quantiles(costs, n=100)[98], 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    for name, value in found.items():
        record_property(name, value)
    print(found)
    assert finished == wanted
    assert after["flips"] - before["flips"] >= FLIPS - 10
    assert after["mixed_steps"] == 0


def test_every_plan_has_the_same_graphs(engine: Any) -> None:
    graphs = engine.control("status")["graphs"]
    assert set(graphs) == {"fp16", "fp8", "mlp"}
    assert len({family["graphs"] for family in graphs.values()}) == 1
    assert graphs["fp16"]["graphs"] > 0


def test_a_plan_in_between_runs_its_kinds_in_fp8_and_the_others_in_16_bits(engine: Any) -> None:
    before = engine.control("status")
    engine.set_mode("mlp")
    engine.timed_pass(32, 16, 4)
    engine.set_mode("fp16")
    status = engine.control("status")
    assert status["tokens"]["mlp"] > before["tokens"]["mlp"]
    assert status["mixed_steps"] == 0


def test_sleep_and_wake_up_keep_every_bit(engine: Any) -> None:
    prompts = engine.prompts(16, 8)
    engine.set_mode("fp16")
    before = greedy_logits(engine, prompts)
    for mode in ("fp16", "fp8"):
        engine.set_mode(mode)
        engine.llm.sleep(level=1)
        engine.llm.wake_up()
    engine.set_mode("fp16")
    assert all(map(torch.equal, greedy_logits(engine, prompts), before))
    assert engine.control("status")["mixed_steps"] == 0


@only_small
def test_reloading_the_checkpoint_changes_no_bit(engine: Any) -> None:
    prompts = engine.prompts(16, 8)
    engine.set_mode("fp16")
    before = greedy_logits(engine, prompts)
    engine.llm.collective_rpc("reload_weights")
    assert all(map(torch.equal, greedy_logits(engine, prompts), before))


def test_memory_is_two_bytes_a_weight(engine: Any) -> None:
    model = engine.worker.model_runner.get_model()
    layers = [module for module in model.modules() if hasattr(module, "weight_upper")]
    assert len(layers) == 4 * CONFIGURATIONS[MODEL]["num_hidden_layers"]
    for layer in layers:
        assert not hasattr(layer, "weight")
        weights = layer.weight_upper.numel()
        stored = sum(parameter.nbytes for parameter in layer.parameters())
        assert stored <= 1.005 * 2 * weights


@only_small
def test_mlps_are_fused_and_give_what_the_checkpoint_says(engine: Any) -> None:
    """Against float64 and the tensors in the file, as loaded and as loaded again."""
    config, dtype = CONFIGURATIONS[MODEL], getattr(torch, DTYPE)
    blocks = engine.worker.model_runner.get_model().model.layers
    x = torch.randn(70, config["hidden_size"], device="cuda").to(dtype)
    exact = []
    file = Path(engine.worker.vllm_config.model_config.model) / "model.safetensors"
    with safe_open(file, "pt", device="cuda") as tensors:
        for i in range(len(blocks)):
            gate, up = (
                x.double() @ tensors.get_tensor(f"model.layers.{i}.mlp.{part}_proj.weight").double().T
                for part in ("gate", "up")
            )
            exact.append(torch.nn.functional.silu(gate) * up)

    def check(mode: str, least: float, most: float) -> None:
        """Bounds are of the error, relative in norm. The mode stays."""
        engine.set_mode(mode)
        # A mode is in force from the next step on.
        greedy_logits(engine, engine.prompts(16, 1))
        for block, expected in zip(blocks, exact, strict=True):
            with torch.inference_mode():
                y = block.mlp.act_fn(block.mlp.gate_up_proj(x)[0])
            assert y.shape == expected.shape
            assert least <= (y.double() - expected).norm() / expected.norm() <= most

    # In 16 bits the output and both products are rounded.
    bounds = {"fp8": (5e-3, 0.15), "fp16": (0.0, 2 * torch.finfo(dtype).eps)}
    for mode, (least, most) in bounds.items():
        check(mode, least, most)
    assert engine.control("status")["fused_mlps"] == len(blocks) == config["num_hidden_layers"]
    layer = blocks[1].mlp.gate_up_proj
    with torch.inference_mode():
        for part in ("upper", "lower", "row_exponent"):
            getattr(layer, f"weight_{part}").zero_()
    engine.llm.collective_rpc("reload_weights")
    for mode, (least, most) in bounds.items():
        check(mode, least, most)


def test_a_wrong_graph_is_found_by_what_the_layers_record(engine: Any) -> None:
    families = engine.worker._graphs.families
    right = [dict(graphs) for _, graphs in families["fp16"].dictionaries]
    for (_, graphs), (_, wrong) in zip(
        families["fp16"].dictionaries, families["fp8"].dictionaries, strict=True
    ):
        graphs.update(wrong)
    before = engine.control("status")["mixed_steps"]
    engine.timed_pass(32, 16, 4)
    for (_, graphs), entries in zip(families["fp16"].dictionaries, right, strict=True):
        graphs.update(entries)
    found = engine.control("status")["mixed_steps"]
    assert found > before
    engine.timed_pass(32, 16, 4)
    assert engine.control("status")["mixed_steps"] == found
