"""The graph bank, against vLLM's real holder classes with fake graphs in them."""

import inspect
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nestedfp.vllm import compat
from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.gpu_worker import PrecisionGPUWorker
from nestedfp.vllm.graphs import GraphBank, GraphFamilyError, Holder, estimated_bytes
from nestedfp.vllm.plan import FP8, FP16, Plan
from nestedfp.vllm.settings import Settings

MLP = Plan("mlp", frozenset({"down_proj"}))
SHAPES = (1, 2, 4)


class FakeGraph:
    """Tells under which plan it was captured when it is replayed."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._plan = ACTIVE.plan.name

    def replay(self) -> None:
        self._log.append(self._plan)


class Model(torch.nn.Module):
    """As vLLM marks those that torch.compile cuts in pieces."""

    do_not_compile = False


class Overwritten(dict[Any, Any]):
    """Says that it is empty, as if each capture began anew."""

    def __contains__(self, key: object) -> bool:
        return False


class Runner:
    """A second-generation runner's parts that hold graphs: piecewise wrappers and the manager."""

    def __init__(self) -> None:
        from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
        from vllm.compilation.cuda_graph import CUDAGraphWrapper
        from vllm.config import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

        self.replayed: list[str] = []
        # Their constructors need a GPU platform; what is tested is how they look graphs up.
        self.wrapper = object.__new__(CUDAGraphWrapper)
        self.wrapper.__dict__.update(
            runnable=lambda: "eager",
            runtime_mode=CUDAGraphMode.PIECEWISE,
            is_debugging_mode=False,
            concrete_cudagraph_entries={},
        )
        CUDAGraphWrapper._all_instances.add(self.wrapper)
        self.breakable = object.__new__(BreakableCUDAGraphWrapper)
        self.breakable.__dict__.update(runnable=lambda: "eager", entries={})
        BreakableCUDAGraphWrapper._all_instances.add(self.breakable)
        self.cudagraph_manager = object.__new__(CudaGraphManager)
        self.cudagraph_manager.graphs = {}
        self.cudagraph_manager._capture_descs = {
            CUDAGraphMode.FULL: [full_shape(tokens) for tokens in SHAPES],
            CUDAGraphMode.PIECEWISE: [SimpleNamespace(num_tokens=tokens) for tokens in SHAPES],
        }
        self.model = Model()
        self.missing: dict[str, int] = {}
        self.captures: list[str] = []

    def get_model(self) -> Model:
        return self.model

    def capture_model(self, **options: Any) -> int:
        from vllm.compilation.cuda_graph import CUDAGraphEntry
        from vllm.forward_context import BatchDescriptor

        plan = ACTIVE.plan.name
        self.captures.append(plan)
        for tokens in SHAPES:
            shape = BatchDescriptor(num_tokens=tokens)
            if self.missing.get(plan) == tokens:
                continue
            entry = CUDAGraphEntry(shape, cudagraph=FakeGraph(self.replayed), output=plan)
            self.wrapper.concrete_cudagraph_entries[shape] = entry
            assert full_shape(tokens) not in self.cudagraph_manager.graphs
            self.cudagraph_manager.graphs[full_shape(tokens)] = FakeGraph(self.replayed)
        return 1 << 20

    def replay(self, tokens: int) -> list[str]:
        """What a step of `tokens` tokens replays: piecewise by the wrapper, full by the manager."""
        from vllm.config import CUDAGraphMode
        from vllm.forward_context import BatchDescriptor, ForwardContext, override_forward_context

        context = object.__new__(ForwardContext)
        context.__dict__.update(
            batch_descriptor=BatchDescriptor(num_tokens=tokens),
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
        )
        self.replayed.clear()
        with override_forward_context(context):
            self.wrapper()
        self.cudagraph_manager.run_fullgraph(full_shape(tokens))
        return list(self.replayed)


def full_shape(tokens: int) -> Any:
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    return BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=tokens, num_reqs=tokens)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    runner = Runner()
    yield runner
    ACTIVE.plan = FP16
    CUDAGraphWrapper._all_instances.discard(runner.wrapper)
    BreakableCUDAGraphWrapper._all_instances.discard(runner.breakable)


def worker_for(runner: Runner, **settings: Any) -> PrecisionGPUWorker:
    """The GPU worker without a GPU: only what captures and flips. Its settings come from another process."""
    worker = object.__new__(PrecisionGPUWorker)
    worker.precision_settings = pickle.loads(pickle.dumps(Settings.from_dict(settings)))
    worker.model_runner = runner
    worker._graphs = GraphBank(lambda: [Holder(*found) for found in compat.graph_holders(runner)])
    worker._capture_one = runner.capture_model
    worker.model_config = SimpleNamespace(enforce_eager=False)
    return worker


def start(worker: PrecisionGPUWorker, capture: Callable[[], int]) -> None:
    """vLLM's own part of the last phase of a start, which is to capture, is `capture`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat.gpu_worker(), "compile_or_warm_up_model", lambda self: capture())
        worker.compile_or_warm_up_model()


def test_loading_leaves_torchs_allocator_as_it_is(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_scoped_allocator_max_split"
    ours, theirs = getattr(PrecisionGPUWorker, name), getattr(compat.gpu_worker(), name)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    changed: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", changed.append)
    with worker_for(runner)._scoped_allocator_max_split(max_split_size_mb=20):
        pass
    assert changed == []


def test_each_plan_replays_the_graphs_that_were_captured_under_it(runner: Runner) -> None:
    worker = worker_for(runner, plans={"mlp": ["down_proj"]})
    assert worker._capture_model() == 3 << 20
    assert runner.captures == ["fp8", "mlp", "fp16"]
    assert runner.replay(2) == ["fp16", "fp16"], "the engine starts in FP16"
    for plan in ["fp8", "mlp", "fp16", "fp8"] * 3:
        worker.flip(worker.precision_settings.plans[plan])
        assert ACTIVE.plan.name == plan
        for tokens in SHAPES:
            assert runner.replay(tokens) == [plan, plan]


def test_the_memory_and_number_of_graphs_of_each_family_are_reported(runner: Runner) -> None:
    worker = worker_for(runner)
    worker._capture_model()
    facts = worker._graphs.facts()
    assert list(facts) == ["fp8", "fp16"]
    assert facts["fp8"]["graphs"] == 2 * len(SHAPES)
    assert facts["fp8"]["bytes"] == 1 << 20


@pytest.mark.parametrize("plan", ["fp8", "fp16"])
def test_a_graph_that_one_family_lacks_stops_the_start(runner: Runner, plan: str) -> None:
    runner.missing[plan] = 4
    with pytest.raises(GraphFamilyError, match=r"plans fp8 and fp16 differ in 1 CUDA graphs of"):
        worker_for(runner)._capture_model()


def test_an_engine_that_has_all_its_graphs_starts(runner: Runner) -> None:
    worker = worker_for(runner)
    start(worker, worker._capture_model)
    assert compat.batches_to_capture(runner) == {(t, whole) for t in SHAPES for whole in (True, False)}
    eager = worker_for(runner)
    eager.model_config = SimpleNamespace(enforce_eager=True)
    start(eager, lambda: 0)


@pytest.mark.parametrize(("holder", "kind"), [("graphs", "in one graph"), ("entries", "in pieces")])
def test_graphs_in_a_holder_that_is_not_known_stop_the_start(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, holder: str, kind: str
) -> None:
    """All families hold the same, and a flip would replay what was captured last."""
    known = compat.graph_holders

    def others(runner: Runner) -> list[tuple[Any, str]]:
        return [found for found in known(runner) if not found[1].endswith(holder)]

    monkeypatch.setattr(compat, "graph_holders", others)
    runner.cudagraph_manager.graphs = Overwritten()
    worker = worker_for(runner)
    message = f"plan fp8 lacks CUDA graphs of 3 of 6 batches, first of 1 tokens {kind}: .* enforce_eager=True"
    with pytest.raises(GraphFamilyError, match=message):
        start(worker, worker._capture_model)


def test_a_capture_past_the_bank_stops_the_start(runner: Runner) -> None:
    with pytest.raises(GraphFamilyError, match=r"6 batches, but not by .* capture_model.*enforce_eager"):
        start(worker_for(runner), runner.capture_model)


def test_a_model_that_is_not_compiled_needs_no_graphs_in_pieces(runner: Runner) -> None:
    runner.model.do_not_compile = True
    assert compat.batches_to_capture(runner) == {(tokens, True) for tokens in SHAPES}


def test_the_first_generation_runner_says_what_it_captures() -> None:
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    whole, pieces = BatchDescriptor(4, num_reqs=2), BatchDescriptor(8)
    descriptors = [(CUDAGraphMode.PIECEWISE, [pieces]), (CUDAGraphMode.FULL, [whole])]
    runner = SimpleNamespace(
        get_model=Model,
        cudagraph_dispatcher=SimpleNamespace(get_capture_descs=lambda: descriptors),
    )
    assert compat.batches_to_capture(runner) == {(4, True), (8, False)}
    assert {compat.captured_batch(key) for key in (whole, pieces)} == {(4, True), (8, False)}


def test_no_graph_can_be_captured_in_service(runner: Runner) -> None:
    from vllm.compilation.monitor import validate_cudagraph_capturing_enabled

    worker_for(runner)._capture_model()
    with pytest.raises(RuntimeError, match="capturing detected"):
        validate_cudagraph_capturing_enabled()


@pytest.mark.parametrize(("sizes", "seen_gib"), [(9, 0.55), (10, 0.81), (51, 1.28)])
def test_what_is_kept_free_for_graphs_holds_what_was_seen(sizes: int, seen_gib: float) -> None:
    estimate = estimated_bytes(plans=2, sizes=sizes, layers=32) / 2**30
    assert seen_gib - 0.01 <= estimate <= seen_gib + 0.3


@pytest.mark.parametrize(
    ("settings", "estimate", "eager", "expected"),
    [
        ({}, 0, False, estimated_bytes(2, 3, 32)),
        ({"graph_reserve_gib": 0.5}, 0, False, 1 << 30),
        ({}, 7 << 20, False, 7 << 20),
        ({"plans": {"mlp": ["down_proj"]}}, 7 << 20, False, 14 << 20),
        ({}, 0, True, 0),
    ],
)
def test_families_that_vllm_does_not_know_are_kept_out_of_the_kv_cache(
    runner: Runner, settings: dict[str, Any], estimate: int, eager: bool, expected: int
) -> None:
    worker = worker_for(runner, **settings)
    worker.model_config = SimpleNamespace(enforce_eager=eager, get_num_layers=lambda _: 32)
    worker.parallel_config = None
    worker.compilation_config = SimpleNamespace(cudagraph_capture_sizes=list(SHAPES))
    worker.cudagraph_memory_estimate = estimate
    assert worker._unestimated_graph_bytes() == expected


def test_profiling_captures_once_and_keeps_nothing(runner: Runner) -> None:
    worker = worker_for(runner)
    assert worker._capture_model(profile_only=True) == 1 << 20
    assert runner.captures == ["fp16"]
    assert worker._graphs.families == {}


def test_without_graphs_a_flip_only_sets_the_plan(runner: Runner) -> None:
    worker = worker_for(runner)
    worker.flip(FP8)
    assert ACTIVE.plan is FP8


def test_a_wrapper_born_during_capture_belongs_to_all_families() -> None:
    class Owner:
        graphs: dict[int, str]

    owners: list[Owner] = []

    def capture_under(plan: Plan) -> int:
        if not owners:
            owners.append(Owner())
            owners[0].graphs = {}
        owners[0].graphs[1] = plan.name
        return 1

    bank = GraphBank(lambda: [Holder(owner, "graphs") for owner in owners])
    bank.capture([FP8, FP16], capture_under)
    bank.install(FP8)
    assert owners[0].graphs == {1: "fp8"}
    bank.install(FP16)
    assert owners[0].graphs == {1: "fp16"}


def test_a_wrong_graph_in_a_family_is_what_the_holder_then_holds(runner: Runner) -> None:
    """The bank cannot see into graphs: only the record of what ran finds a wrong one."""
    worker = worker_for(runner)
    worker._capture_model()
    fp8 = dict(worker._graphs.families["fp8"].dictionaries[-1][1])
    worker.flip(FP16)
    runner.cudagraph_manager.graphs[full_shape(2)] = fp8[full_shape(2)]
    assert runner.replay(2) == ["fp16", "fp8"]
    assert runner.replay(4) == ["fp16", "fp16"]
