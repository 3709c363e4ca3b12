"""Reading machine code without a GPU."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubin: bytes) -> str:
    """The SASS of a cubin."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [str(_TOOLS / "cuobjdump"), "-sass", file.name]
        return subprocess.run(tool, capture_output=True, check=True, text=True).stdout


def assert_registers_suffice(macros: Mapping[str, int]) -> None:
    """setmaxnreg waits for registers of its own CTA: for more than it was launched with, forever."""
    consumers = macros["CONSUMERS"]
    threads = (consumers + 1) * 128
    launched = 65536 // threads // 8 * 8 * threads
    assert 128 * (macros["PRODUCER_REGISTERS"] + consumers * macros["CONSUMER_REGISTERS"]) <= launched
