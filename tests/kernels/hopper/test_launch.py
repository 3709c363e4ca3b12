"""What a launch is made of, without a driver."""

import ctypes
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nestedfp.kernels.hopper.cuda import launch
from nestedfp.kernels.hopper.cuda.launch import AHEAD_BYTES, ahead_of, planes_of, tensor_map


class Driver:
    """Counts the tensor maps that it encodes."""

    def __init__(self) -> None:
        self.encoded = 0

    def cuTensorMapEncodeTiled(self, *_: object) -> int:
        self.encoded += 1
        return 0


def test_a_tensor_map_is_encoded_once_for_the_same_place_and_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    tensor_map.cache_clear()
    described = (torch.float16, 1 << 20, 64, 4096, 4096, 64, 64)
    first = tensor_map(*described)
    assert tensor_map(*described) is first
    assert driver.encoded == 1
    for place, value in ((1, 1 << 21), (2, 65), (4, 8192), (5, 32)):
        other = [*described[:place], value, *described[place + 1 :]]
        assert tensor_map(*other) is not first
    assert driver.encoded == 5
    tensor_map.cache_clear()


def addresses(planes: tuple[torch.Tensor, ...]) -> list[int | None]:
    return list(ahead_of(planes_of(planes)).planes)


def test_what_is_asked_ahead_is_shared_by_the_planes() -> None:
    one, two = torch.empty((2, AHEAD_BYTES), dtype=torch.uint8)
    assert ahead_of(planes_of(())).bytes == 0
    assert (ahead_of(planes_of((one,))).bytes, addresses((one,))) == (AHEAD_BYTES, [one.data_ptr(), None])
    both = ahead_of(planes_of((one, two)))
    assert (both.bytes, list(both.planes)) == (AHEAD_BYTES // 2, [one.data_ptr(), two.data_ptr()])


def test_short_planes_are_asked_for_in_whole_granules_and_crooked_ones_not_at_all() -> None:
    plane = torch.empty(1024, dtype=torch.uint8)
    assert ahead_of(planes_of((plane[:70],))).bytes == 64
    assert ahead_of(planes_of((plane[1:],))).bytes == 0
    assert ahead_of(planes_of((plane[:500], plane[500:1000]))).bytes == 496
    assert addresses((plane[:500], plane[500:1000])) == [plane.data_ptr(), None]


class Launcher:
    """A driver that notes what is launched: the grid, the stream, the first argument."""

    def __init__(self) -> None:
        self.launched: list[tuple[int, int, int]] = []
        self.status = 0

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *_: 0

    def cuOccupancyMaxActiveClusters(self, count: Any, *_: object) -> int:
        count._obj.value = 1
        return 0

    def cuLaunchKernelEx(self, config: Any, function: object, pointers: Any, extra: object) -> int:
        config = config._obj
        first = ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_int)).contents.value
        self.launched.append((config.grid[0], config.stream, first))
        return self.status

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name._obj.value = b"CUDA_ERROR_OUT_OF_LUCK"
        return 0


def test_a_launch_is_made_again_on_the_stream_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Launcher()
    streams = iter([11, 22, 11])
    asked: list[int] = []

    def current(device: int) -> int:
        asked.append(device)
        return next(streams)

    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", current, raising=False)
    kernel = launch.Kernel(b"", "product", threads=384, shared=1024, cluster=2)
    # Nothing else holds the argument: the launch must.
    again = launch.Launch(kernel, 3, (ctypes.c_int(7),), 5)
    gc.collect()
    for _ in range(2):
        again()
    assert driver.launched == [(6, 11, 7), (6, 22, 7)]
    assert asked == [5, 5]
    driver.status = 1
    with pytest.raises(RuntimeError, match="launching 3 clusters of 2: CUDA_ERROR_OUT_OF_LUCK"):
        again()
