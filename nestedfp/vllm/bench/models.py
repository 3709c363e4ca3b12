"""Models for benchmarks: configurations that need no download, and their folders."""

import json
from pathlib import Path
from typing import Any

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
