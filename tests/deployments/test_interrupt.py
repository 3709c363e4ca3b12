"""Signals sent to this very process: when they raise, and when they wait."""

import os
import signal
from collections.abc import Iterator

import pytest

from nestedfp.deployments.interrupt import Interrupted, interrupts_held, raise_on_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    raise_on_signals()
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_raises_and_later_ones_do_not_disturb_the_shutdown(name: signal.Signals) -> None:
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), name)
    for later in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), later)


def test_a_held_signal_raises_when_the_outermost_block_ends() -> None:
    done = []

    def blocks() -> None:
        with interrupts_held():
            with interrupts_held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")

    with pytest.raises(Interrupted):
        blocks()
    assert done == ["inner", "outer"]


def test_a_held_signal_does_not_hide_an_error_of_the_block() -> None:
    def block() -> None:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("of the block")

    with pytest.raises(ValueError, match="of the block"):
        block()


def test_a_block_without_a_signal_leaves_nothing_held() -> None:
    done = []
    with interrupts_held():
        done.append("inside")
    done.append("after")
    assert done == ["inside", "after"]
    # One that waited, or a block that still held, would keep this one from being raised here.
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
