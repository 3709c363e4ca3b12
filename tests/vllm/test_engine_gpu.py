"""The plugin on a GPU, with CUDA graphs and a small random model, every step checked on the device."""

import json
from typing import Any

import pytest

from nestedfp.vllm.bench import CONFIGURATIONS

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama-tiny")
    (folder / "config.json").write_text(json.dumps(CONFIGURATIONS["llama-tiny"]))
    task = {"engine": "nestedfp", "model": str(folder), "dtype": "float16", "device": "cuda", "blocks": 4096}
    task["capture_sizes"] = [1, 2, 4, 8, 32]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        from nestedfp.vllm.contender import Engine

        yield Engine(task, check_steps=True, plans={"mlp": ["gate_up_proj", "down_proj"]})


def test_a_flip_before_every_step_mixes_nothing_and_changes_no_token(engine: Any) -> None:
    checks = engine.check_flips()
    assert checks["fp16_tokens_equal_after_flips"]
    assert checks["mixed_steps"] == 0
    assert checks["flips"] >= checks["steps"] - 2
    assert checks["flip_us_p99"] < 1000


def test_every_plan_has_the_same_graphs(engine: Any) -> None:
    graphs = engine.control("status")["graphs"]
    assert set(graphs) == {"fp16", "fp8", "mlp"}
    assert len({family["graphs"] for family in graphs.values()}) == 1
    assert graphs["fp16"]["graphs"] > 0


def test_a_plan_in_between_runs_its_kinds_in_fp8_and_the_others_in_16_bits(engine: Any) -> None:
    before = engine.control("status")
    engine.control("set_target", mode="mlp", epoch=0)
    engine.timed_pass(32, 16, 4)
    engine.control("set_target", mode="fp16", epoch=0)
    status = engine.control("status")
    assert status["tokens"]["mlp"] > before["tokens"]["mlp"]
    assert status["mixed_steps"] == 0


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


def test_memory_is_two_bytes_a_weight(engine: Any) -> None:
    model = engine.worker.model_runner.get_model()
    layers = [module for module in model.modules() if hasattr(module, "weight_upper")]
    assert len(layers) == 4 * CONFIGURATIONS["llama-tiny"]["num_hidden_layers"]
    for layer in layers:
        assert not hasattr(layer, "weight")
        weights = layer.weight_upper.numel()
        stored = sum(parameter.nbytes for parameter in layer.parameters())
        assert stored <= 1.005 * 2 * weights
