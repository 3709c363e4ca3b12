"""Two ranks of tensor parallelism load their shards of two layers, of which one has a row that would not
rebuild bit for bit, on the last rank alone. Prints what each rank made of them, a JSON line a rank.

    python two_ranks.py
"""

import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
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


def run(rank: int, store: Path) -> dict[str, str]:
    """The state of each layer on this rank."""
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
    return ACTIVE.layers


if __name__ == "__main__":
    # Forked, so that vLLM is imported once. The ranks wait for each other: none runs twice.
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(RANKS, multiprocessing.get_context("fork")) as ranks,
    ):
        for rank, layers in enumerate(ranks.map(run, range(RANKS), [Path(folder) / "store"] * RANKS)):
            print(json.dumps({"name": str(rank), "layers": layers}), flush=True)
