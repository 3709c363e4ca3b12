"""Small random models of several classes, each in plain vLLM and in a nested engine; prints a JSON line each.

    python tiny_models.py [NAME ...]

A line holds the counts of the nested engine's layers with the reasons of those that stayed plain, and of
every prompt token the log-probability and rank under plain vLLM and under both precisions.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_SHARED = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "float16", {}),
    "mistral": ("mistral", "float16", {"sliding_window": None}),
    "qwen2": ("qwen2", "float16", {"tie_word_embeddings": True}),
    "phi3": ("phi3", "float16", {"original_max_position_embeddings": 256}),
    "gemma2": ("gemma2", "bfloat16", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}),
    "mixtral": ("mixtral", "float16", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""By name: transformers' model type, the dtype, what differs from the shared configuration. Qwen2 has biases
on QKV; vLLM refuses Gemma 2 in float16."""

PROMPTS = [[(7 * prompt + 13 * position) % 500 + 3 for position in range(24)] for prompt in range(4)]


def checkpoint(name: str, folder: Path, seed: int = 0, **more_changes: Any) -> Path:
    """A random checkpoint as transformers saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, dtype, changes = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_SHARED, **changes, **more_changes, "initializer_range": 0.1})
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            # Biases are zero, norms one (or zero, counted from one) when new.
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / name)
    return folder / name


def scores(llm: Any) -> list[list[float]]:
    """[log-probability, rank] of every prompt token but the first of each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    found = []
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for token, entry in zip(prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True):
            found.append([entry[token].logprob, entry[token].rank])
    return found


def start(folder: Path, dtype: str, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(folder),
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=8,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        num_gpu_blocks_override=64,
        **arguments,
    )


def stop(llm: Any) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    # Done once a process; again, it would stumble over llvmlite's modules, which answer to any name.
    type(current_platform).register_triton_kernel_overrides = lambda *_: None
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def compare(name: str, folder: Path) -> dict[str, Any]:
    import nestedfp.vllm

    path, dtype = checkpoint(name, folder), MODELS[name][1]
    llm = start(path, dtype)
    found: dict[str, Any] = {"name": name, "plain": scores(llm)}
    stop(llm)
    llm = start(path, dtype, **nestedfp.vllm.engine_arguments("cpu"))
    core = llm.llm_engine.engine_core.engine_core
    for mode in ("fp16", "fp8"):
        answer = core.nestedfp_control({"command": "set_target", "mode": mode, "epoch": 0})
        assert "error" not in answer, answer
        found[mode] = scores(llm)
    status = core.nestedfp_control({"command": "status"})["result"]
    found |= {key: status[key] for key in ("layers", "plain_reasons", "mixed_steps", "steps")}
    stop(llm)
    return found


def set_up() -> None:
    """Before vLLM is imported: engines in this process, on the CPU, quiet, the plugin registered."""
    sys.path.insert(0, str(Path(__file__).parent))
    from greedy_reference import ENVIRONMENT

    os.environ.update(ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    # Else some of vLLM's helpers are compiled, with a C++ compiler.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import nestedfp.vllm

    nestedfp.vllm.register()


def main(names: list[str]) -> None:
    set_up()
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or MODELS:
            print(json.dumps(compare(name, Path(scratch))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
