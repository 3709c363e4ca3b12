"""Log-probabilities under both precisions, shared by the engine under test and the one on a single GPU.

Run as a program it is the reference: a nested engine on one GPU, in a process of its own.

    python tensor_parallel.py MODEL OUT.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = ((24, 6), (200, 2))
"""(length, number) of the prompts that are scored."""
TOKENS = 8


def task(model: str, ranks: int) -> dict[str, Any]:
    return {
        "engine": "nestedfp",
        "model": model,
        "dtype": os.environ.get("NESTEDFP_TEST_DTYPE", "float16"),
        "device": "cuda",
        "blocks": 4096,
        "capture_sizes": [1, 2, 4, 8, 32],
        "load_format": "auto",
        "tensor_parallel": ranks,
    }


def scores(engine: Any) -> list[float]:
    """The log-probability of every prompt token but the first and of every token that the engine chose."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0
    )
    found = []
    prompts = [prompt for length, count in PROMPTS for prompt in engine.prompts(length, count)]
    for prompt, output in zip(prompts, engine.llm.generate(prompts, params, use_tqdm=False), strict=True):
        tokens = prompt["prompt_token_ids"]
        positions = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        found += [entry[token].logprob for token, entry in positions]
        chosen = output.outputs[0]
        found += [
            entry[token].logprob for token, entry in zip(chosen.token_ids, chosen.logprobs, strict=True)
        ]
    return found


def prompt_positions() -> list[bool]:
    """For each score, whether it is a prompt token's: those do not depend on what was chosen before."""
    return [
        index < length - 1
        for length, count in PROMPTS
        for _ in range(count)
        for index in range(length - 1 + TOKENS)
    ]


def main(model: str, out: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from nestedfp.vllm.bench.engine import Engine

    engine = Engine(task(model, 1))
    found = {}
    for mode in ("fp16", "fp8"):
        engine.set_mode(mode)
        found[mode] = scores(engine)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
