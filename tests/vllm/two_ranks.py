"""Two ranks of tensor parallelism load their shards of two layers, of which one has a row that would not
rebuild bit for bit, on the last rank alone. Prints what each rank made of them, a JSON line a rank.

    python two_ranks.py
"""

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from nestedfp.vllm.active import ACTIVE
from nestedfp.vllm.linear import NestedLinearMethod
from nestedfp.vllm.settings import Inexact

RANKS = 2


def load(name: str, weight: torch.Tensor) -> None:
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    NestedLinearMethod(name, Inexact.AUTO).process_weights_after_loading(layer)


def run(rank: int, store: Path) -> None:
    # As vLLM's worker has it, for the shared memory of ranks on one CPU.
    os.environ["VLLM_DIST_IDENT"] = store.parent.name
    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(RANKS, rank, f"file://{store}", rank, "gloo")
        parallel_state.initialize_model_parallel(RANKS, backend="gloo")
    weight = torch.full((8, 16), 0.5, dtype=torch.float16)
    load("0.down_proj", weight.clone())
    if rank == RANKS - 1:
        weight[0, 0], weight[0, 1] = 1000.0, 6e-8
    load("1.down_proj", weight)
    print(json.dumps({"name": str(rank), "layers": ACTIVE.layers}), flush=True)


if __name__ == "__main__":
    # One import of vLLM for both.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run, args=(rank, Path(folder) / "store")) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=300)
    raise SystemExit(any(process.exitcode for process in ranks))
