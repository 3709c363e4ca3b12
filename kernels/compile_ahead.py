"""Compiles kernels in several processes at once, so that a run on a lent GPU does not wait for them in turn.

The processes share Triton's cache on disk with the one that times. Each runs a product once on operands
whose contents do not matter.
"""

import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from typing import NamedTuple

import torch
from triton.errors import TritonError

from nestedfp.kernels.dispatch import Backend, Config, Mode, Problem, choose
from nestedfp.kernels.layout import PANEL, KOrder

_MOST_PROCESSES = 12


class Job(NamedTuple):
    """One product: `config` None leaves it to the kernel's own rule."""

    backend: Backend
    mode: Mode
    dtype: str
    M: int
    N: int
    K: int
    config: Config | None


def chosen(mode: Mode, dtype: str, M: int, N: int, K: int) -> Job:
    """What the dispatch chooses on this device for operands laid out well."""
    order = KOrder.HOPPER if K % PANEL == 0 else KOrder.NATURAL
    choice = choose(
        Problem(mode, M, N, K, dtype, order), torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    )
    return Job(choice.backend, mode, dtype, M, N, K, choice.config)


def compile_ahead(jobs: Iterable[Job]) -> list[str]:
    """Compiles what `jobs` need; returns the complaints of those that failed."""
    distinct = {_identity(job): job for job in jobs}
    if len(distinct) < _MOST_PROCESSES:
        return []
    processes = min(_MOST_PROCESSES, multiprocessing.cpu_count())
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            complaints = list(pool.map(_run, distinct.values()))
        except BrokenProcessPool as error:
            return [f"a process ended while it compiled: {error}"]
    return [complaint for complaint in complaints if complaint]


def _identity(job: Job) -> tuple[object, ...]:
    """Jobs with the same one compile the same kernel. Triton makes another one of sizes that are 1, or no
    multiple of 16."""
    sizes = (job.M, job.N, job.K)
    if job.config is None:
        shape: tuple[object, ...] = sizes
    elif job.backend is Backend.PORTABLE:
        shape = tuple((size == 1, size % 16 == 0) for size in sizes)
    else:
        shape = (job.N % 8, job.K % PANEL)
    config = None if job.config is None else tuple(sorted(job.config.items()))
    return (job.backend, job.mode, job.dtype, shape, config)


def _run(job: Job) -> str:
    backend = import_module(f"nestedfp.kernels.{job.backend}")
    dtype = getattr(torch, job.dtype)
    x = torch.empty(job.M, job.K, dtype=dtype, device="cuda")
    upper = torch.empty(job.N, job.K, dtype=torch.uint8, device="cuda")
    exponent = torch.zeros(job.N, dtype=torch.int8, device="cuda")
    order = KOrder.HOPPER if job.K % PANEL == 0 else KOrder.NATURAL
    options = {"order": order, "config": job.config}
    try:
        if job.mode is Mode.FP8:
            backend.linear_fp8(x, upper, exponent, **options)
        else:
            backend.linear_16bit(x, upper, upper, exponent, **options)
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, TritonError) as error:
        return f"{job}: {error}"
    finally:
        torch.cuda.empty_cache()
    return ""
