"""The worker mixin over a stand-in for vLLM's worker."""

import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch

from nestedfp.vllm import gated
from nestedfp.vllm import worker as worker_module
from nestedfp.vllm.active import ACTIVE, NESTED, LayerRecord
from nestedfp.vllm.config import NestedFPConfig
from nestedfp.vllm.linear import STAGING
from nestedfp.vllm.plan import FP8, FP16, Plan
from nestedfp.vllm.settings import Settings
from nestedfp.vllm.step import REPORT, TAG, StepReport, StepTag
from nestedfp.vllm.worker import PrecisionMixin, refuse_unsupported

PARALLEL = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "data_parallel_index": 0}


def vllm_config(**changes: Any) -> SimpleNamespace:
    config = {
        "quant_config": NestedFPConfig(Settings()),
        "model_config": SimpleNamespace(quantization="nestedfp"),
        "parallel_config": SimpleNamespace(**PARALLEL),
        "lora_config": None,
        "speculative_config": None,
        "compilation_config": SimpleNamespace(cudagraph_mm_encoder=False),
        "additional_config": {},
    }
    return SimpleNamespace(**{**config, **changes})


MODEL = object()


class BaseWorker:
    """Runs nothing; notes the plan that was in force, and answers as vLLM's two kinds of runner do."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.device = torch.device("cpu")
        self.ran: list[str] = []
        self.answer: Any = SimpleNamespace(tokens=[1])
        self.sampled: Any = None

    def load_model(self) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: MODEL)

    def execute_model(self, scheduler_output: Any) -> Any:
        self.ran.append(ACTIVE.plan.name)
        return self.answer

    def sample_tokens(self, grammar: Any) -> Any:
        return self.sampled


class Worker(PrecisionMixin, BaseWorker):
    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(vllm_config(quant_config=NestedFPConfig(settings or Settings())))
        self.flips: list[str] = []

    def flip(self, plan: Plan) -> None:
        self.flips.append(plan.name)
        super().flip(plan)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(ACTIVE, "plan", FP16)
    monkeypatch.setattr(ACTIVE, "record", None)
    return Worker()


def step(plan: str | None) -> SimpleNamespace:
    output = SimpleNamespace()
    if plan:
        setattr(output, TAG, StepTag(plan, "test", 0.0))
    return output


def test_every_step_runs_under_the_plan_of_its_tag(worker: Worker) -> None:
    reports = [getattr(worker.execute_model(step(plan)), REPORT) for plan in ["fp16", "fp8", "fp8", "fp16"]]
    assert worker.ran == ["fp16", "fp8", "fp8", "fp16"]
    assert worker.flips == ["fp8", "fp16"]
    assert [report.plan for report in reports] == worker.ran
    assert [report.flip_seconds is not None for report in reports] == [False, True, False, True]


def test_a_step_without_tokens_has_no_tag_and_changes_nothing(worker: Worker) -> None:
    worker.execute_model(step("fp8"))
    answer = worker.execute_model(step(None))
    assert ACTIVE.plan is FP8
    assert not hasattr(answer, REPORT)


def test_the_report_waits_for_sampling(worker: Worker) -> None:
    worker.answer, worker.sampled = None, SimpleNamespace(tokens=[2])
    assert worker.execute_model(step("fp8")) is None
    assert getattr(worker.sample_tokens(None), REPORT) == StepReport(
        "fp8", pytest.approx(0, abs=1), None, ACTIVE.loads
    )
    assert not hasattr(worker.sample_tokens(None), REPORT), "one report a step"


def test_vllms_shared_empty_output_is_not_written_to(worker: Worker) -> None:
    shared = worker.answer
    before = copy.copy(shared)
    assert hasattr(worker.execute_model(step("fp8")), REPORT)
    assert shared == before


def test_an_output_still_on_the_device_gets_its_report_when_it_arrives(worker: Worker) -> None:
    class Pending(worker_module._AsyncModelRunnerOutput):  # type: ignore[misc]
        def get_output(self) -> Any:
            return SimpleNamespace(tokens=[3])

    worker.answer = Pending()
    pending = worker.execute_model(step("fp8"))
    worker.answer = Pending()
    worker.execute_model(step("fp16"))
    arrived = pending.get_output()
    assert arrived.tokens == [3]
    assert getattr(arrived, REPORT).plan == "fp8"


def test_a_layer_that_ran_something_else_is_reported(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    exponents = torch.zeros(4, dtype=torch.int8)
    record = LayerRecord({exponents.data_ptr(): "down_proj"}, torch.device("cpu"))
    monkeypatch.setattr(ACTIVE, "record", record)
    record.write(exponents, FP16.precision("down_proj"))
    assert getattr(worker.execute_model(step("fp8")), REPORT).mismatches == 1
    record.write(exponents, FP8.precision("down_proj"))
    assert getattr(worker.execute_model(step("fp8")), REPORT).mismatches == 0
    assert worker.checked_steps() == {"steps": 2, "mixed": 1, "checksum": crc32(b"\x01\x02")}


def test_a_new_worker_knows_nothing_of_an_engine_before_it(worker: Worker) -> None:
    exponents = torch.zeros(4, dtype=torch.int8)
    planes = torch.zeros((2, 4, 8), dtype=torch.uint8)
    ACTIVE.note_nested("model.layers.0.mlp.down_proj", "down_proj", *planes, exponents)
    ACTIVE.plan = FP8
    Worker()
    assert ACTIVE.plan is FP16
    assert ACTIVE.layer_counts() == ({"nested": 0, "plain": 0}, {})
    ones = torch.ones(4, dtype=torch.int8)
    ACTIVE.note_nested("model.layers.0.mlp.down_proj", "down_proj", *planes, ones)
    ACTIVE.start_recording(torch.device("cpu"))
    assert ACTIVE.record is not None
    assert len(ACTIVE.record.take()) == 1
    ACTIVE.clear()


def test_a_reload_of_a_layer_shows_in_the_reports_and_the_facts(worker: Worker) -> None:
    name = "model.layers.0.mlp.down_proj"
    planes, exponents = torch.zeros((2, 4, 8), dtype=torch.uint8), torch.zeros(4, dtype=torch.int8)
    ACTIVE.note_nested(name, "down_proj", *planes, exponents)
    before = worker.precision_facts()
    assert getattr(worker.execute_model(step("fp16")), REPORT).loads == before["loads"]
    ACTIVE.inexact_rows[name] = 3
    ACTIVE.note_layer(name, NESTED)
    after = worker.precision_facts()
    assert getattr(worker.execute_model(step("fp16")), REPORT).loads == after["loads"] > before["loads"]
    assert (before["inexact_rows"], after["inexact_rows"]) == (0, 3)
    ACTIVE.clear()


@pytest.mark.parametrize("wanted", [True, False])
def test_mlps_are_fused_after_the_load_and_before_staging_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    STAGING.release()
    states: list[Any] = []
    for fails in (False, True):
        worker = Worker(Settings(fuse_silu=wanted))

        def fuse(model: Any, fails: bool = fails) -> None:
            assert model is MODEL
            STAGING.planes(torch.zeros(4, 8))
            ACTIVE.mlps["mlp.0"] = gated.FUSED
            ACTIVE.mlps["mlp.1"] = "layer with a bias" if fails else gated.FUSED

        monkeypatch.setattr(worker_module, "fuse_silu", fuse)
        monkeypatch.setattr(worker_module.logger, "propagate", True)
        with caplog.at_level("INFO", logger="vllm.nestedfp"):
            worker.load_model()
        assert worker.staging_bytes == 64 * wanted
        facts = worker.precision_facts()
        fused = (2 - fails) * wanted
        unfused = {"layer with a bias": 1} if fails and wanted else {}
        assert (facts["fused_mlps"], facts["unfused_reasons"]) == (fused, unfused)
        assert f"{fused} MLPs fused, {len(unfused)} not" in caplog.text
        states.append(json.dumps(worker.vllm_config.additional_config))
    assert ("1 MLPs not fused: layer with a bias" in caplog.text) == wanted
    assert (states[0] != states[1]) == wanted, "vLLM's compile cache goes by it"
    ACTIVE.clear()


@pytest.mark.parametrize("method", ["reload_weights", "finish_weight_update"])
@pytest.mark.parametrize("failing", [False, True])
def test_new_weights_leave_no_staging_memory(worker: Worker, method: str, failing: bool) -> None:
    def nest_all(self: Any) -> None:
        STAGING.planes(torch.zeros(4, 8))
        if failing:
            raise ValueError("the weights do not nest")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseWorker, method, nest_all, raising=False)
        with pytest.raises(ValueError, match="do not nest") if failing else nullcontext():
            getattr(worker, method)()
    assert STAGING.release() == 0


def test_ranks_that_ran_unlike_answer_unlike(monkeypatch: pytest.MonkeyPatch) -> None:
    exponents = torch.zeros(4, dtype=torch.int8)
    answers = []
    for plans in (("fp8", "fp16"), ("fp8", "fp16"), ("fp16", "fp8"), ("fp8",)):
        rank = Worker()
        record = LayerRecord({exponents.data_ptr(): "down_proj"}, torch.device("cpu"))
        monkeypatch.setattr(ACTIVE, "record", record)
        for plan in plans:
            record.write(exponents, {"fp8": FP8, "fp16": FP16}[plan].precision("down_proj"))
            rank.execute_model(step(plan))
        answers.append(rank.checked_steps())
    same, also, swapped, shorter = answers
    assert same == also
    assert len({str(answer) for answer in (same, swapped, shorter)}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_config": object()}, "LoRA yet; merge the adapter"),
        ({"speculative_config": object()}, "speculative decoding yet; drop"),
        ({"parallel_config": SimpleNamespace(**{**PARALLEL, "pipeline_parallel_size": 2})}, "pipeline"),
        ({"parallel_config": SimpleNamespace(**{**PARALLEL, "data_parallel_size": 2})}, "data parallelism"),
        (
            {"parallel_config": SimpleNamespace(**{**PARALLEL, "data_parallel_index": 1})},
            "data parallelism yet; start one engine per rank",
        ),
        (
            {"compilation_config": SimpleNamespace(cudagraph_mm_encoder=True)},
            "CUDA graphs of encoders yet; drop cudagraph_mm_encoder",
        ),
    ],
)
def test_what_is_not_supported_is_refused_at_start(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(vllm_config(**changes))


def test_batch_invariance_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' tiles, and with them the order of sums, follow the number of tokens."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="batch-invariant results yet; unset VLLM_BATCH_INVARIANT"):
        refuse_unsupported(vllm_config())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    refuse_unsupported(vllm_config())


def test_a_worker_without_the_quantization_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"need quantization='nestedfp', but the engine has None"):
        worker_module.settings_of(
            SimpleNamespace(quant_config=None, model_config=SimpleNamespace(quantization=None))
        )
