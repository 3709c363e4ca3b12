"""Prompts and greedy decoding, shared by the nested engine under test and the plain one beside it.

Run as a program it is the reference: plain vLLM in a process of its own.

    python greedy_reference.py MODEL OUT.json
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

TOKENS = 64

PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "A short recipe for tomato soup: first,",
    "In 1969, astronauts from the United States",
    "The difference between a list and a tuple in Python is",
    "Dear Sir or Madam,\nI am writing to",
    "Photosynthesis is the process by which",
    "List five animals that live in the ocean:\n1.",
    "The train to Edinburgh leaves at",
    "To compute the area of a circle, multiply",
    "My grandmother used to say that",
    "The largest planet in the solar system is",
    "SELECT name, age FROM users WHERE",
    "Winter came early that year, and",
    "An operating system is a program that",
    "Q: What is the opposite of hot?\nA:",
    "The orchestra fell silent as",
]

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Greedy:
    """One completion: its token ids, and by how much the best logit led the second best at each."""

    token_ids: list[int]
    leads: list[float]


def engine_settings(model: str) -> dict[str, Any]:
    settings = {"model": model, "dtype": "float16", "max_model_len": 1024, "enforce_eager": True}
    if torch.cuda.is_available():
        # Beside other engines on the card: a small cache, and nothing measured.
        settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30}
    return settings


def sampling() -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 2}


def completion(output: Any) -> Greedy:
    """Reads vLLM's `CompletionOutput`; a difference of log-probabilities is one of logits."""
    leads = []
    for candidates in output.logprobs:
        best, second = sorted((entry.logprob for entry in candidates.values()), reverse=True)[:2]
        leads.append(best - second)
    return Greedy(list(output.token_ids), leads)


def main(model: str, out: str) -> None:
    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_settings(model))
    params = SamplingParams(**sampling())
    results = [completion(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]) for prompt in PROMPTS]
    Path(out).write_text(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
