"""Small random models in nested engines whose MLPs are fused or not; prints a JSON line for each model.

    python fused_models.py [NAME ...]

A CPU has no kernels of its own for gated products, so the fused engine is told to fuse all the same. Four
engines score the same prompts: not fused; not fused, with an activation that rounds once, as gated products
do; fused, before and after it reloads other weights; fused, with those weights from the start.
"""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

MODELS = ["llama", "qwen2", "phi3", "gemma2"]


def rounds_once(self: Any, x: torch.Tensor) -> torch.Tensor:
    """In place of SiluAndMul's, with the sums of a gated product: float32 until the result."""
    from swiglu import in_turn

    from nestedfp.kernels.gated import silu_and_multiply

    return silu_and_multiply(in_turn(x))


def scored(core: Any, llm: Any) -> dict[str, list[float]]:
    """Log-probabilities of the prompts' tokens, by precision, after flips to and fro."""
    from tiny_models import scores

    found: dict[str, list[float]] = {}
    for mode in ("fp8", "fp16", "fp8", "fp16"):
        answer = core.nestedfp_control({"command": "set_target", "mode": mode, "epoch": 0})
        assert "error" not in answer, answer
        now = [score for score, _ in scores(llm)]
        assert found.setdefault(mode, now) == now, f"{mode} differs after a flip"
    return found


def engine(path: Path, dtype: str, fused: bool, then: Path | None = None) -> dict[str, Any]:
    """What one engine gives, and again after it has loaded the weights of `then`."""
    from tiny_models import start, stop

    import nestedfp.vllm

    llm = start(path, dtype, **nestedfp.vllm.engine_arguments("cpu", fuse_silu=fused))
    core = llm.llm_engine.engine_core.engine_core
    found: dict[str, Any] = {"scores": scored(core, llm)}
    if then is not None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(then)})
        found["reloaded"] = scored(core, llm)
    status = core.nestedfp_control({"command": "status"})["result"]
    keys = ("layers", "plain_reasons", "fused_mlps", "unfused_reasons", "mixed_steps")
    found |= {key: status[key] for key in keys}
    stop(llm)
    return found


def compare(name: str, folder: Path) -> dict[str, Any]:
    import tiny_models

    from nestedfp.vllm import compat

    dtype = tiny_models.MODELS[name][1]
    # On a CPU vLLM does not reload a head that is tied to the embeddings. Gemma 2 has no other.
    tied = name == "gemma2"
    first, second = (
        tiny_models.checkpoint(name, folder / str(seed), seed, tie_word_embeddings=tied) for seed in (0, 1)
    )
    activation = compat.swiglu_classes()[1]
    found = {"name": name, "unfused": engine(first, dtype, fused=False)}
    stock = activation.forward_cpu
    activation.forward_cpu = rounds_once
    found["rounded_once"] = engine(first, dtype, fused=False)
    activation.forward_cpu = stock
    found["fused"] = engine(first, dtype, fused=True, then=second)
    found["fresh"] = engine(second, dtype, fused=True)
    return found


def main(names: list[str]) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import tiny_models

    tiny_models.set_up()
    from nestedfp.kernels import KOrder
    from nestedfp.vllm import gated, worker

    worker.fuse_silu = partial(gated.fuse_silu, orders=tuple(KOrder))
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or MODELS:
            print(json.dumps(compare(name, Path(scratch) / name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
