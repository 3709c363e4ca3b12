"""One engine of `nestedfp bench engine`, and what is measured on it.

The engine's core runs in the same process (no IPC), so that steps can be driven one by one, and nothing
runs on the GPU between two calls. With tensor parallelism its workers are processes of their own.
"""

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from itertools import chain
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from nestedfp.vllm import compat
from nestedfp.vllm.bench.models import DEVIATION
from nestedfp.vllm.bench.timeline import Span, added_time

CHECKED_PROMPTS = 8
CHECKED_TOKENS = 64
FLIPPED_BATCH = 32
# Of every run of steps that is timed: a step's length grows with its context.
STEPWISE_TOKENS = 512
FLIPPED_RUNS = 2
# A prefill of few tokens is host and GPU by turns, and one reading of it is off by half: it is read so often,
# while that takes no longer than so many seconds.
FIRST_TOKENS_READ = 8
FIRST_TOKENS_S = 0.3
PROFILED_KERNELS = 12
PROFILED_MIB = 2048
"""Given to vLLM as the size of the KV cache where the number of blocks is set: it then measures nothing."""

PHASES = {
    "init_device": "device",
    "load_model": "weights",
    "determine_available_memory": "compiling and profiling",
    "initialize_from_config": "KV cache",
    "compile_or_warm_up_model": "warm-up and graphs",
}
"""The worker's methods in the order of a start, and what each is called in the report."""


class Engine:
    """An offline vLLM engine with random weights, and what is measured on it."""

    def __init__(
        self,
        task: dict[str, Any],
        start_one_by_one: AbstractContextManager[Any] | None = None,
        **settings: Any,
    ) -> None:
        """`task` as `session.Session` writes it; `settings` as `engine_arguments` takes them, for NestedFP
        alone.

        Where the task says `share_kv`, the memory of the KV cache is taken from `start_one_by_one` on, which
        is entered before, and is given back by `park`.
        """
        from vllm import LLM

        self._cuda = task["device"] == "cuda"
        self.peak_load_bytes = self.wait_s = 0.0
        self.phases_s: dict[str, float] = {}
        self._parking: compat.ParkedKV | None = None
        self._turn = start_one_by_one or nullcontext()
        self._held = ExitStack()
        self._parallel = task.get("tensor_parallel", 1)
        self._is_nested = task["engine"] == "nestedfp"
        compat.fill_dummy_weights(_fill)
        if self._cuda and self._parallel == 1:
            compat.watch_worker(PHASES, self._entered, self._left)
            if task.get("share_kv"):
                self._parking = compat.ParkedKV()
        self.settings = engine_settings(task)
        self._start = self._last = task.get("spawned_at", time.time())
        try:
            self.llm = LLM(
                model=task["model"],
                dtype=task["dtype"],
                load_format=task.get("load_format", "dummy"),
                skip_tokenizer_init=True,
                disable_log_stats=False,
                seed=0,
                **self.settings,
                **_engine_arguments(task["engine"], task["device"], settings),
            )
            self.start_s = time.time() - self._start - self.wait_s
            self.core = self.llm.llm_engine.engine_core.engine_core
            self.park()
        finally:
            self._held.close()
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._tokens = range(10, vocabulary)

    @property
    def worker(self) -> Any:
        """The worker, where it lives in this process: without tensor parallelism."""
        return self.core.model_executor.driver_worker.worker

    def _entered(self, method: str) -> None:
        if PHASES[method] == "KV cache":
            start = time.monotonic()
            self._held.enter_context(self._turn)
            self.wait_s = time.monotonic() - start
            self._last += self.wait_s

    def _left(self, method: str) -> None:
        now = time.time()
        self.phases_s[PHASES[method]] = now - self._last
        self._last = now
        if PHASES[method] == "weights":
            self.peak_load_bytes = torch.cuda.max_memory_allocated()

    def facts(self) -> dict[str, Any]:
        """The start, in all and, where the worker lives in this process, by phase; memory; and how many MLPs
        NestedFP has fused."""
        found = {"start_s": self.start_s, "phases_s": self.phases_s, "memory": self.memory()}
        if self._parallel == 1 and hasattr(self.worker, "kernels_s"):
            found["kernels_s"] = self.worker.kernels_s
        if self._is_nested:
            found["fused_mlps"] = self.control("status")["fused_mlps"]
        return found

    def park(self) -> None:
        """Gives the memory of the KV cache back, if it is shared, until the next pass."""
        if self._parking is not None:
            torch.cuda.synchronize()
            self._parking.park()

    def prompts(self, length: int, batch: int) -> list[dict[str, list[int]]]:
        """Random ones, the same for the same arguments in every engine."""
        return _prompts(self._tokens, length, batch)

    def timed_pass(self, input_len: int, output_len: int, batch: int) -> dict[str, float]:
        """One batch, all requests at once: output tokens/s, and the medians of TTFT and TPOT in ms. A short
        TTFT is the median of further batches, too, that end with their first token."""
        if self._parking is not None:
            self._parking.unpark()
        prompts = self.prompts(input_len, batch)

        def answered(tokens: int) -> list[Any]:
            outputs = self.llm.generate(prompts, greedy(tokens), use_tqdm=False)
            return [output.metrics for output in outputs]

        start = time.perf_counter()
        stats = answered(output_len)
        seconds = time.perf_counter() - start
        decode = [s.last_token_ts - s.first_token_ts for s in stats]
        first = [median(s.first_token_latency for s in stats)]
        while len(first) < FIRST_TOKENS_READ and sum(first) + first[0] < FIRST_TOKENS_S:
            first.append(median(s.first_token_latency for s in answered(1)))
        return {
            "tokens_per_s": batch * output_len / seconds,
            "ttft_ms": 1e3 * median(first),
            "ttft_batches": len(first),
            "tpot_ms": 1e3 * median(decode) / max(1, output_len - 1),
        }

    def control(self, command: str, **arguments: Any) -> Any:
        answer = self.core.nestedfp_control({"command": command, **arguments})
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def set_mode(self, mode: str) -> None:
        self.control("set_target", mode=mode, epoch=0)

    def memory(self) -> dict[str, Any]:
        """Of the first rank. The peak while loading is known only where the worker lives in this process."""
        weights_bytes, reserved_bytes = self.core.model_executor.collective_rpc(_worker_memory)[0]
        return {
            "weights_bytes": weights_bytes,
            "peak_load_bytes": int(self.peak_load_bytes),
            "kv_blocks": self.core.vllm_config.cache_config.num_gpu_blocks,
            "reserved_bytes": reserved_bytes,
        }

    def check_flips(self) -> dict[str, Any]:
        """Greedy tokens in 16 bits, then a batch with a flip before every step, then the same tokens.

        The lengths of unflipped steps are measured before and after the flips over the same contexts, and
        averaged.
        """
        if self._parking is not None:
            self._parking.unpark()
        prompts, params = self.prompts(64, CHECKED_PROMPTS), greedy(CHECKED_TOKENS)

        def tokens() -> list[list[int]]:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        def steady() -> dict[str, list[float]]:
            times = {}
            for mode in ("fp8", "fp16"):
                self.set_mode(mode)
                times[mode] = self._stepwise(None)[0]
            return times

        self.set_mode("fp16")
        before = tokens()
        steady()
        first = steady()
        start = self.control("status")
        flipped: list[float] = []
        costs: list[float] = []
        for _ in range(FLIPPED_RUNS):
            times, swaps = self._stepwise(("fp8", "fp16"))
            flipped += times
            costs += swaps
        end = self.control("status")
        second = steady()
        unflipped = {mode: first[mode] + second[mode] for mode in first}
        return {
            "fp16_tokens_equal_after_flips": tokens() == before,
            "steps": sum(end["steps"].values()) - sum(start["steps"].values()),
            "flips": end["flips"] - start["flips"],
            "mixed_steps": end["mixed_steps"],
            "flip_us_median": 1e6 * median(costs),
            "flip_us_p99": 1e6 * quantiles(costs, n=100)[98],
            "step_ms": {
                **{mode: 1e3 * fmean(times) for mode, times in unflipped.items()},
                "flipping": 1e3 * fmean(flipped),
            },
            "step_batch": FLIPPED_BATCH,
            "graphs": end["graphs"],
            "layers": end["layers"],
            "fused_mlps": end["fused_mlps"],
        }

    def profile(self) -> dict[str, Any]:
        """What kernels add (`added_time`) to a decode step of 32, of 256 and of 512 requests, and to a
        prefill of 8 x 1024 tokens."""
        if self._parking is not None:
            self._parking.unpark()
        return {
            "decode": self._profiled(16, FLIPPED_BATCH, tokens=32, skipped=8, steps=8),
            **{
                f"decode of {batch}": self._profiled(16, batch, tokens=32, skipped=8, steps=8)
                for batch in (256, 512)
            },
            "prefill": self._profiled(1024, 8, tokens=1, skipped=0, steps=1),
        }

    def _profiled(self, length: int, batch: int, tokens: int, skipped: int, steps: int) -> dict[str, Any]:
        engine = self.llm.llm_engine

        def take(count: int) -> None:
            for _ in range(count):
                engine.step()
            torch.cuda.synchronize()

        # The first time is a warm-up.
        for profile in (nullcontext(), torch.profiler.profile(activities=[ProfilerActivity.CUDA])):
            for index, prompt in enumerate(self.prompts(length, batch)):
                engine.add_request(f"profile-{index}", prompt, greedy(tokens))
            take(skipped)
            with profile:
                take(steps)
            while engine.has_unfinished_requests():
                engine.step()
        return added_time(_spans(profile), steps, PROFILED_KERNELS)

    def _stepwise(self, modes: tuple[str, str] | None) -> tuple[list[float], list[float]]:
        """Decodes one batch step by step, with another of `modes` before each; the seconds of each step that
        holds the whole batch and no prompt, and of each flip."""
        engine, counts = self.llm.llm_engine, self.core.scheduler.counts if modes else None
        for index, prompt in enumerate(self.prompts(16, FLIPPED_BATCH)):
            engine.add_request(f"step-{index}", prompt, greedy(STEPWISE_TOKENS))
        times, costs, step, flips = [], [], 0, counts.flips if counts else 0
        while engine.has_unfinished_requests():
            if modes:
                self.core.scheduler.selection.set_target(modes[step % 2], 0)
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
            step += 1
            if counts and counts.flips > flips:
                flips = counts.flips
                costs.append(counts.last_flip_seconds)
        return times[len(times) // 8 : -len(times) // 8], costs


def engine_settings(task: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments that all contenders share."""
    settings: dict[str, Any] = {
        "max_model_len": task.get("max_model_len", 2048),
        "max_num_seqs": 512,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.9,
        "enable_prefix_caching": False,
        "num_gpu_blocks_override": task["blocks"],
    }
    if task["blocks"]:
        # Several engines on one device: measuring free memory would count the others' too.
        settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": PROFILED_MIB << 20}
    if task.get("capture_sizes"):
        settings["compilation_config"] = {"cudagraph_capture_sizes": task["capture_sizes"]}
    if task.get("tensor_parallel", 1) > 1:
        settings["tensor_parallel_size"] = task["tensor_parallel"]
    extra: dict[str, Any] = task.get("settings", {})
    return settings | extra


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of the memory behind a model's parameters and buffers; what they share counts once."""
    storages = (tensor.untyped_storage() for tensor in chain(model.parameters(), model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _spans(profile: Any) -> Iterator[Span]:
    """What ran on the device while the torch profiler did."""
    for event in profile.events():
        if event.device_type == torch.profiler.DeviceType.CUDA and not event.is_user_annotation:
            yield Span(event.name, event.time_range.start, event.time_range.end)


def _worker_memory(worker: Any) -> tuple[int, int]:
    """Bytes of weights, and what torch holds of the GPU; run in the worker's process."""
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
    return stored_bytes(worker.model_runner.get_model()), reserved


@lru_cache(maxsize=4)
def _prompts(tokens: range, length: int, batch: int) -> list[dict[str, list[int]]]:
    choices = random.Random(f"{length}/{batch}")
    return [{"prompt_token_ids": choices.choices(tokens, k=length)} for _ in range(batch)]


def _engine_arguments(engine: str, device: Any, settings: dict[str, Any]) -> dict[str, Any]:
    if engine == "nestedfp":
        import nestedfp.vllm

        nestedfp.vllm.register()
        return nestedfp.vllm.engine_arguments(device, **settings)
    return {"quantization": "fp8"} if engine == "vllm-fp8" else {}


def greedy(tokens: int) -> Any:
    """vLLM's sampling parameters of a request that makes so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _fill(parameter: torch.Tensor) -> None:
    """Matrices normal with a small deviation, norms one, as in a trained model."""
    if parameter.dim() < 2:
        parameter.fill_(1.0)
    else:
        generator = torch.Generator(device=parameter.device).manual_seed(parameter.numel() % (1 << 31))
        parameter.normal_(0.0, DEVIATION, generator=generator)
