"""Models for benchmarks: configurations that need no download, and their folders."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

DEVIATION = 0.02
"""Of the random weights of matrices, as in a trained model."""

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 8192,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-tiny": {
        **_LLAMA,
        "vocab_size": 4096,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
"""By name; any folder with a config.json serves as well."""


def model_folder(model: str, scratch: Path) -> Path:
    """A folder with the config.json of `model`, a name or a folder; a name's is made in `scratch`."""
    if model not in CONFIGURATIONS:
        if not (Path(model) / "config.json").is_file():
            raise SystemExit(
                f"--model: {model!r} is neither one of {list(CONFIGURATIONS)} nor a model folder"
            )
        return Path(model)
    folder = scratch / model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGURATIONS[model]))
    return folder


def random_checkpoint(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """A folder with a checkpoint of the configuration `name`, normal weights as in the benchmark: for what
    needs the same weights in several engines, or a file to load them from again."""
    config = CONFIGURATIONS[name]
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "lm_head": (config["vocab_size"], hidden)}
    norms = ["model.norm"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        for part, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (middle, hidden),
            "mlp.up_proj": (middle, hidden),
            "mlp.down_proj": (hidden, middle),
        }.items():
            shapes[prefix + part] = shape
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{part}.weight": torch.ones(hidden, dtype=dtype) for part in norms}
    for part, shape in shapes.items():
        tensors[f"{part}.weight"] = (torch.randn(shape, generator=generator) * DEVIATION).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    stated = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(stated))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
