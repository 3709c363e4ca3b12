"""Loading a cubin and launching it through the driver: clusters, tensor maps, early start.

Everything goes through libcuda by ctypes. What a launch needs is kept for the next one, whole where its
operands lie where they lay: a step that is no CUDA graph, such as a prompt of a thousand tokens, can take as
long as the host needs to launch it.
"""

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

_MAX_DYNAMIC_SHARED = 8
_CLUSTER_DIMENSION = 4
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_ELEMENTS = {torch.uint8: 0, torch.float16: 6, torch.bfloat16: 9}
# Swizzle by the bytes of a row of the box.
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_L2_128 = 2

AHEAD_BYTES = 4 << 20
"""Measured in chains of an 8B model's products with small kernels between: 2 to 4 MiB save 1 to 1.6 % of a
decode step, 16 MiB and more cost up to 5 %."""


class TensorMap(ctypes.Structure):
    """What a kernel takes as `const __grid_constant__ TensorMap`."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


NO_MAP = TensorMap()
"""Where a kernel takes a map that this launch does not use."""


class Ahead(ctypes.Structure):
    """What a kernel takes as `Ahead`: see ahead.cuh."""

    _fields_ = [("planes", ctypes.c_void_p * 2), ("bytes", ctypes.c_uint)]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(what: str, status: int) -> None:
    if status != 0:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what}: {(name.value or b'error').decode()} ({status})")


@lru_cache(maxsize=1 << 13)
def tensor_map(
    dtype: torch.dtype, address: int, height: int, width: int, stride: int, rows: int, columns: int
) -> TensorMap:
    """Of elements of `dtype` at `address`, [height, width] with rows `stride` elements apart, in boxes of
    `rows` by `columns`. It is shared between launches and says where and how, not what lies there.

    The address and, with more than one row, the rows' distance are multiples of 16 bytes; a row of the box is
    16, 32, 64 or 128 bytes and swizzled as widely in shared memory.
    """
    size = dtype.itemsize
    pitch = stride * size if height > 1 else -(-width * size // 16) * 16
    # The driver writes to a 64-byte boundary only.
    raw = ctypes.create_string_buffer(192)
    aligned = (ctypes.addressof(raw) + 63) & ~63
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _ELEMENTS[dtype],
        2,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(width, height),
        (ctypes.c_uint64 * 1)(pitch),
        (ctypes.c_uint32 * 2)(columns, rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        _SWIZZLES[columns * size],
        _PROMOTE_L2_128,
        0,
    )
    _check(f"describing [{height}, {width}] with pitch {pitch} in boxes of {rows} x {columns}", status)
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, ctypes.sizeof(TensorMap)))


class Kernel:
    """One function of a cubin on the current device, always launched with the same block and cluster."""

    def __init__(self, cubin: bytes, name: str, *, threads: int, shared: int, cluster: int) -> None:
        torch.cuda.current_stream().cuda_stream  # noqa: B018 - makes the context that modules belong to
        self._threads, self._shared, self.cluster = threads, shared, cluster
        self._module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        driver = _driver()
        _check(f"loading {name}", driver.cuModuleLoadData(ctypes.byref(self._module), cubin))
        found = driver.cuModuleGetFunction(ctypes.byref(self.function), self._module, name.encode())
        _check(f"finding {name}", found)
        raised = driver.cuFuncSetAttribute(self.function, _MAX_DYNAMIC_SHARED, shared)
        _check(f"{name} with {shared} bytes of shared memory", raised)
        self.resident_clusters = self._resident_clusters(name)
        self._configs: dict[tuple[int, int], _LaunchConfig] = {}

    def _resident_clusters(self, name: str) -> int:
        """How many clusters the idle device holds at once."""
        count = ctypes.c_int()
        launch = self._config(self.cluster, None, early=False)
        driver = _driver()
        status = driver.cuOccupancyMaxActiveClusters(ctypes.byref(count), self.function, ctypes.byref(launch))
        _check(f"occupancy of {name}", status)
        if count.value < 1:
            raise RuntimeError(f"{name}: no cluster of {self.cluster} fits this device")
        return count.value

    def _config(self, ctas: int, stream: int | None, *, early: bool) -> _LaunchConfig:
        attributes = (_Attribute * 2)()
        attributes[0].id = _CLUSTER_DIMENSION
        attributes[0].value[0], attributes[0].value[1], attributes[0].value[2] = self.cluster, 1, 1
        attributes[1].id = _PROGRAMMATIC_STREAM_SERIALIZATION
        attributes[1].value[0] = 1
        return _LaunchConfig(
            (ctypes.c_uint * 3)(ctas, 1, 1),
            (ctypes.c_uint * 3)(self._threads, 1, 1),
            self._shared,
            stream,
            attributes,
            2 if early else 1,
        )

    def config(self, clusters: int, stream: int) -> _LaunchConfig:
        """Of a launch of so many clusters that may start before the kernel in front of it has ended."""
        found = self._configs.get((clusters, stream))
        if found is None:
            found = self._configs[clusters, stream] = self._config(
                clusters * self.cluster, stream, early=True
            )
        return found


class Launch:
    """A kernel with its arguments, to be launched any number of times, on the stream of the moment."""

    def __init__(self, kernel: Kernel, clusters: int, arguments: tuple[Any, ...], device: int) -> None:
        """arguments: ctypes values in the order of the kernel's parameters."""
        self._kernel, self._clusters, self._device = kernel, clusters, device
        # The pointers lead into the arguments, which must live as long.
        self._arguments = arguments
        self._pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))

    def __call__(self) -> None:
        """Launches on the current stream of the device."""
        config = self._kernel.config(self._clusters, torch._C._cuda_getCurrentRawStream(self._device))
        status = _driver().cuLaunchKernelEx(ctypes.byref(config), self._kernel.function, self._pointers, None)
        if status != 0:
            _check(f"launching {self._clusters} clusters of {self._kernel.cluster}", status)


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies, None for None."""
    return None if tensor is None else tensor.data_ptr()


Planes = tuple[int, ...]
"""The size of planes of bytes, equally long, and the address of each; empty without any."""


def planes_of(tensors: tuple[Tensor, ...]) -> Planes:
    """Of planes that the next product reads."""
    return (tensors[0].numel(), *(tensor.data_ptr() for tensor in tensors)) if tensors else ()


@lru_cache(maxsize=1 << 13)
def ahead_of(planes: Planes) -> Ahead:
    """The beginning of each of at most two planes: `AHEAD_BYTES` in all."""
    size, addresses = (planes[0], planes[1:]) if planes else (0, ())
    # The copy engine asks for nothing off 16-byte boundaries.
    aligned = [where for where in addresses if where % 16 == 0]
    if not aligned:
        return Ahead()
    return Ahead((ctypes.c_void_p * 2)(*aligned), min(AHEAD_BYTES // len(aligned), size & ~15))
