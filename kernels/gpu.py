"""The GPU that figures come from: its name, versions, clocks while it worked, the rates it reaches."""

import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nestedfp.kernels import rowfile
from nestedfp.kernels.timing import measure

_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
_SAMPLE_MS = 250
_COPY_BYTES = 4 << 30
_SQUARE = 8192


def require_gpu(command: str) -> None:
    """Raises SystemExit, naming the remedy, where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit(f"{command}: torch {torch.__version__} sees no CUDA device; run it on a GPU host")


def slug() -> str:
    """The present device's name in the names of files."""
    return rowfile.slug(torch.cuda.get_device_name())


def describe() -> dict[str, Any]:
    """Device, driver and versions; `vllm` is null where it is not installed."""
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": _version("vllm"),
        "date": now(),
    }


def driver() -> str:
    """The version of the GPU's driver."""
    return _query(["driver_version"])[0]


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi(fields: Sequence[str]) -> list[str]:
    """The command that prints them of torch's first device; nvidia-smi ignores CUDA_VISIBLE_DEVICES."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", card]


def _query(fields: list[str]) -> list[str]:
    line = subprocess.run(_nvidia_smi(fields), capture_output=True, text=True, check=True, timeout=30).stdout
    return [value.strip() for value in line.split(",")]


class ClockMonitor:
    """Samples clocks, power and temperature in the background while its block runs."""

    def __enter__(self) -> "ClockMonitor":
        # By name, so that `seen` reads through a file position of its own.
        self._file = NamedTemporaryFile("a")
        command = [*_nvidia_smi(_FIELDS), "-lms", str(_SAMPLE_MS)]
        self._process = subprocess.Popen(command, stdout=self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)
        self._file.close()

    def seen(self) -> str:
        """The range of what was sampled so far, in words. Call it inside the block."""
        samples = [_numbers(line) for line in Path(self._file.name).read_text().splitlines()]
        columns = list(zip(*(sample for sample in samples if sample), strict=True))
        if not columns:
            return "not sampled"
        sm, memory, watts, celsius = columns
        return (
            f"SM {min(sm):.0f} to {max(sm):.0f} MHz (median {median(sm):.0f}), memory {median(memory):.0f} "
            f"MHz, up to {max(watts):.0f} W and {max(celsius):.0f} C; {len(sm)} samples, "
            f"one every {_SAMPLE_MS} ms"
        )


def _numbers(line: str) -> list[float] | None:
    """The fields of a complete line; the last one may have been cut."""
    try:
        values = [float(value) for value in line.split(",")]
    except ValueError:
        return None
    return values if len(values) == len(_FIELDS) else None


def ceilings() -> dict[str, float]:
    """Measured: bytes read plus written a second of a large copy, and operations a second of large products.

    Reading alone is faster than a copy: a product of few tokens may move more bytes a second.
    Keys `copy_tb_s`, `float16_tflop_s`, `bfloat16_tflop_s`, `fp8_tflop_s` (row-wise, without the quantiser).
    """
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = _least_us(lambda _: target.copy_(source))
    found = {"copy_tb_s": round(2 * _COPY_BYTES / copy / 1e6, 3)}
    operations = 2 * _SQUARE**3
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(_SQUARE, _SQUARE, device="cuda", dtype=dtype) for _ in range(2))
        us = _least_us(lambda _, a=a, b=b: torch.mm(a, b.T))
        found[f"{str(dtype).removeprefix('torch.')}_tflop_s"] = round(operations / us / 1e6, 1)
    found["fp8_tflop_s"] = round(operations / _least_us(_fp8_square()) / 1e6, 1)
    return found


def _fp8_square() -> Any:
    def codes() -> Tensor:
        return (torch.randn(_SQUARE, _SQUARE, device="cuda") * 64).to(torch.float8_e4m3fn)

    a, b, ones = codes(), codes(), torch.ones(_SQUARE, device="cuda")
    return lambda _: torch._scaled_mm(
        a, b.T, ones[:, None], ones[None], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _least_us(work: Any) -> float:
    return min(measure({"work": work}, 2, passes=3)["work"])
