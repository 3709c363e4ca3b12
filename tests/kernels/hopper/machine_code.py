"""Reading machine code without a GPU."""

import subprocess
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
