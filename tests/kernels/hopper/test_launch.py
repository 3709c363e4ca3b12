"""What a launch is made of, without a driver."""

import pytest
import torch

from nestedfp.kernels.hopper.cuda import launch
from nestedfp.kernels.hopper.cuda.launch import AHEAD_BYTES, ahead_of, tensor_map


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
    return list(ahead_of(planes).planes)


def test_what_is_asked_ahead_is_shared_by_the_planes() -> None:
    one, two = torch.empty((2, AHEAD_BYTES), dtype=torch.uint8)
    assert ahead_of(()).bytes == 0
    assert (ahead_of((one,)).bytes, addresses((one,))) == (AHEAD_BYTES, [one.data_ptr(), None])
    both = ahead_of((one, two))
    assert (both.bytes, list(both.planes)) == (AHEAD_BYTES // 2, [one.data_ptr(), two.data_ptr()])


def test_short_planes_are_asked_for_in_whole_granules_and_crooked_ones_not_at_all() -> None:
    plane = torch.empty(1024, dtype=torch.uint8)
    assert ahead_of((plane[:70],)).bytes == 64
    assert ahead_of((plane[1:],)).bytes == 0
    assert ahead_of((plane[:500], plane[500:1000])).bytes == 496
    assert addresses((plane[:500], plane[500:1000])) == [plane.data_ptr(), None]
