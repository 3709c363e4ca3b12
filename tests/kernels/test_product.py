"""Where a product runs: on the device of its operands, whichever is current."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nestedfp.kernels import linear_16bit, linear_fp8, product
from nestedfp.kernels.dispatch import Backend, Capability, Mode, Problem
from nestedfp.kernels.layout import KOrder

M, N, K = 4, 32, 128


class Devices:
    """Stands for torch's current device, and notes the devices that products were launched on."""

    def __init__(self) -> None:
        self.current = 0
        self.entered = 0
        self.launched: list[int] = []
        self.fails = False

    def current_device(self) -> int:
        return self.current

    def device(self, device: torch.device) -> Any:
        return _Entered(self, device.index)

    def launch(self, x: Tensor, *_: object, **__: object) -> Tensor:
        self.launched.append(self.current)
        if self.fails:
            raise RuntimeError("no launch")
        return x.new_empty((x.shape[0], N))


class _Entered:
    def __init__(self, devices: Devices, index: int) -> None:
        self.devices, self.index = devices, index

    def __enter__(self) -> None:
        self.before, self.devices.current = self.devices.current, self.index
        self.devices.entered += 1

    def __exit__(self, *_: object) -> None:
        self.devices.current = self.before


@pytest.fixture(params=[Backend.HOPPER, Backend.PORTABLE])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    fake = Devices()

    def chosen(problem: Problem, capability: Capability | None, device: str) -> tuple[Backend, Any]:
        return request.param, fake.launch

    monkeypatch.setattr(torch.cuda, "current_device", fake.current_device)
    monkeypatch.setattr(torch.cuda, "device", fake.device)
    monkeypatch.setattr(product, "_product", chosen)
    monkeypatch.setattr(product, "_device", lambda device: ((9, 0), ""))
    monkeypatch.setattr(product, "fits_bulk_copies", lambda x, weight: True)
    with FakeTensorMode():
        yield fake


def run(device: str) -> None:
    x = torch.empty((M, K), dtype=torch.float16, device=device)
    upper = torch.empty((N, K), dtype=torch.uint8, device=device)
    row_exponent = torch.empty(N, dtype=torch.int8, device=device)
    y = product.multiply(Mode.FP8, x, (upper,), row_exponent, None, KOrder.NATURAL, ())
    assert y.device == torch.device(device)


def test_a_product_for_another_device_is_launched_there_and_the_current_one_is_restored(
    devices: Devices,
) -> None:
    run("cuda:1")
    assert (devices.launched, devices.current) == ([1], 0)


def test_the_current_device_is_not_entered_again(devices: Devices) -> None:
    run("cuda:0")
    assert (devices.launched, devices.entered) == ([0], 0)


def test_a_launch_that_fails_leaves_the_current_device_as_it_was(devices: Devices) -> None:
    devices.fails = True
    with pytest.raises(RuntimeError, match="no launch"):
        run("cuda:1")
    assert (devices.launched, devices.current) == ([1], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("order", list(KOrder))
def test_both_products_on_a_second_gpu(order: KOrder) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(M, K, dtype=torch.float16, device="cuda:1")
    upper = torch.randint(0, 127, (N, K), dtype=torch.uint8, device="cuda:1")
    lower = torch.full_like(upper, 191)
    row_exponent = torch.zeros(N, dtype=torch.int8, device="cuda:1")
    found = []
    for device in ("cuda:1", "cuda:0"):
        at = [operand.to(device) for operand in (x, upper, lower, row_exponent)]
        found.append((linear_16bit(*at, order=order), linear_fp8(at[0], at[1], at[3], order=order)))
    assert torch.cuda.current_device() == 0
    for there, here in zip(*found, strict=True):
        assert there.device == x.device
        assert torch.equal(there.cpu(), here.cpu())
