"""What keeps a kernel from being compiled or kept says what is missing and what to do."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nestedfp.kernels.hopper.cuda import compile as nvrtc


@pytest.fixture(autouse=True)
def version_asked_again() -> Iterator[None]:
    nvrtc._nvrtc_version.cache_clear()
    yield
    nvrtc._nvrtc_version.cache_clear()


def have(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", module and SimpleNamespace(nvrtc=module))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", module)


def test_without_the_bindings_the_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, None)
    with pytest.raises(RuntimeError, match=r"pip install 'cuda-bindings.*' 'nvidia-cuda-nvrtc"):
        nvrtc.cubin("gemm_fp8.cu", {}, {})


def test_bindings_without_the_library_name_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise RuntimeError("Failure finding libnvrtc.so")

    have(monkeypatch, SimpleNamespace(nvrtcVersion=absent))
    with pytest.raises(RuntimeError, match=r"missing \(Failure finding libnvrtc.so\).*'nvidia-cuda-nvrtc"):
        nvrtc.cubin("gemm_fp8.cu", {}, {})


def compiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for NVRTC; returns the names of what it compiles."""
    compiled: list[str] = []

    def compile_(source: str, *_: object) -> bytes:
        compiled.append(source)
        return b"code"

    have(monkeypatch, SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0)))
    monkeypatch.setattr(nvrtc, "_compile", compile_)
    return compiled


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("NESTEDFP_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/file/kernels.*set NESTEDFP_CACHE to a folder"):
        nvrtc.cubin("gemm_fp8.cu", {}, {})


def test_machine_code_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = compiler(monkeypatch)
    monkeypatch.setenv("NESTEDFP_CACHE", str(tmp_path))
    assert nvrtc.cubin("gemm_fp8.cu", {}, {"A": 1}) == b"code"
    assert nvrtc.cubin("gemm_fp8.cu", {}, {"A": 1}) == b"code"
    assert nvrtc.cubin("gemm_fp8.cu", {}, {"A": 2}) == b"code"
    assert compiled == ["gemm_fp8.cu", "gemm_fp8.cu"]
