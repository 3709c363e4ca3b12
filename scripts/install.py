"""Makes the virtual environment `.venv` and installs the project into it. Standard library only.

    python3 scripts/install.py [--extras cpu,dev]

A finished installation leaves a stamp, `.venv/installed`, that names what it was made from; with the same
`pyproject.toml`, extras and Python a second run does nothing.
"""

import argparse
import hashlib
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
LOG = ROOT / "out" / "install.log"

TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# vLLM's CPU wheel asks for these; nothing here uses them, and builds for another torch fail at import,
# which would stop vLLM from loading.
OPTIONAL_TORCH_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extras", default="cpu,dev", help="extras of pyproject.toml (default: %(default)s)")
    extras = parser.parse_args().extras
    if sys.version_info < (3, 11):  # noqa: UP036 - this script is what tells
        sys.exit(f"Python {sys.version.split()[0]} is too old: NestedFP needs 3.11 or newer; make PYTHON=...")
    wanted = fingerprint(extras)
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    started = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    if not PYTHON.exists():
        print("creating .venv", flush=True)
        create_environment()
    if "cpu" in extras.split(","):
        install_cpu_torch()
    step(f"installing nestedfp[{extras}]", ["-m", "pip", "install", "-e", f"{ROOT}[{extras}]"])
    remove_broken_packages()
    STAMP.write_text(wanted)
    print(f"installed in {time.monotonic() - started:.0f} s", flush=True)


def fingerprint(extras: str) -> str:
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return f"{digest} {extras} {sys.version.split()[0]}\n"


def create_environment() -> None:
    try:
        venv.create(VENV, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit(
            "Python could not make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        )


def install_cpu_torch() -> None:
    """From the configured index if it carries the CPU build, else from PyTorch's own."""
    command = ["-m", "pip", "install", TORCH_CPU]
    if not step(f"installing {TORCH_CPU}", command, required=False):
        step(f"installing {TORCH_CPU} from PyTorch's index", [*command, "--index-url", TORCH_CPU_INDEX])


def remove_broken_packages() -> None:
    for name in OPTIONAL_TORCH_PACKAGES:
        probe = f"import importlib.util as u, sys; sys.exit(u.find_spec('{name}') is None)"
        if not succeeds(["-c", probe]) or succeeds(["-c", f"import {name}"]):
            continue
        step(f"removing {name}, built for another torch", ["-m", "pip", "uninstall", "-y", name])


def succeeds(arguments: list[str]) -> bool:
    return subprocess.run([PYTHON, *arguments], capture_output=True, check=False).returncode == 0


def step(title: str, arguments: list[str], *, required: bool = True) -> bool:
    """Runs Python with `arguments`, its output in the log and its progress on one line."""
    started = shown = time.monotonic()
    on_terminal = sys.stdout.isatty()
    print(title, end="" if on_terminal else "\n", flush=True)
    with LOG.open("a") as log:
        process = subprocess.Popen(
            [PYTHON, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            now = time.monotonic()
            if line.startswith(("Collecting", "Downloading", "Installing")) and now - shown > (
                1 if on_terminal else 15
            ):
                shown = now
                status = f"{title}: {now - started:.0f} s, {' '.join(line.split()[:2])[:60]}"
                print(
                    f"\r\033[K{status}" if on_terminal else f"  {status}",
                    end="" if on_terminal else "\n",
                    flush=True,
                )
        code = process.wait()
    print("\r\033[K" if on_terminal else "", end="")
    if code and required:
        tail = "\n".join(LOG.read_text().splitlines()[-20:])
        sys.exit(f"{title} failed (the whole log: {LOG.relative_to(ROOT)}):\n{tail}")
    return code == 0


if __name__ == "__main__":
    main()
