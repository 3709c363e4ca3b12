"""CUDA C++ sources of this folder to machine code for sm_90a, by NVRTC: needs no GPU and no CUDA toolkit.

cuda.bindings and NVRTC come with every torch for CUDA 13; beside another torch they are installed by name.
Sources include nothing but headers of this folder and those that the caller writes out. Cubins are kept on
disk, in $NESTEDFP_CACHE or the user's cache folder, by what they were made from.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock
from typing import Any

ARCHITECTURE = "sm_90a"


def cubin(source: str, headers: Mapping[str, str], defines: Mapping[str, int]) -> bytes:
    """The machine code of file `source` with macros `defines`; `headers` maps further include names to texts.

    Raises RuntimeError: with the compiler's log where it fails, with the remedy where there is no NVRTC or
    the machine code cannot be kept.
    """
    files = {**_headers(), **headers}
    version = _nvrtc_version()
    recipe = repr((source, _text(source), sorted(files.items()), sorted(defines.items()), version))
    kept = cache_folder() / f"{Path(source).stem}-{sha256(recipe.encode()).hexdigest()[:32]}.cubin"
    with _lock(kept), _naming_the_folder(kept.parent):
        if kept.is_file():
            return kept.read_bytes()
        made = _compile(source, files, defines)
        kept.parent.mkdir(parents=True, exist_ok=True)
        # Processes may write the same one at once; a rename leaves either of them whole.
        with NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, kept)
    return made


@cache
def _nvrtc_version() -> tuple[int, ...]:
    try:
        from cuda.bindings import nvrtc

        # The library itself is looked for by the first call.
        return tuple(nvrtc.nvrtcVersion()[1:])
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"products on this GPU are compiled by NVRTC of CUDA 13, which is missing ({error}); beside any "
            "torch, install it by: pip install 'cuda-bindings>=13,<14' 'nvidia-cuda-nvrtc>=13,<14'"
        ) from error


@contextmanager
def _naming_the_folder(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"compiled kernels are kept in {folder}, which cannot be read or written ({error}); set "
            "NESTEDFP_CACHE to a folder that can"
        ) from error


def cache_folder() -> Path:
    """Where cubins are kept."""
    chosen = os.environ.get("NESTEDFP_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestedfp" / "kernels"


def _compile(source: str, files: Mapping[str, str], defines: Mapping[str, int]) -> bytes:
    from cuda.bindings import nvrtc

    def check(what: str, result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{what} {source}: {result[0]}")
        return result[1] if len(result) > 1 else None

    texts = [text.encode() for text in files.values()]
    names = [name.encode() for name in files]
    made = nvrtc.nvrtcCreateProgram(_text(source).encode(), source.encode(), len(files), texts, names)
    program = check("creating", made)
    options = [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * check("logging", nvrtc.nvrtcGetProgramLogSize(program))
        check("logging", nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"compiling {source} with {dict(defines)}: {status}\n{log.decode()}")
    code = b" " * check("measuring", nvrtc.nvrtcGetCUBINSize(program))
    check("reading", nvrtc.nvrtcGetCUBIN(program, code))
    check("freeing", nvrtc.nvrtcDestroyProgram(program))
    return code


@cache
def _lock(kept: Path) -> Lock:
    """Of a cubin in this process: a thread that needs one under way waits for it."""
    return Lock()


@cache
def _text(name: str) -> str:
    return (resources.files(__package__) / name).read_text()


@cache
def _headers() -> dict[str, str]:
    files = resources.files(__package__).iterdir()
    return {file.name: file.read_text() for file in files if file.name.endswith(".cuh")}
