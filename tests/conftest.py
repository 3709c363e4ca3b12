"""Fixtures shared by all tests."""

import os
import sys

import pytest
import torch
from hypothesis import settings

# `make test` tries the same examples every time; `make search` draws new ones, and many.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("search", max_examples=2000, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def model_path() -> str:
    """The folder of SmolLM2-135M-Instruct in FP16, fetched once into the user's cache."""
    from nestedfp.models import demo_model

    return str(demo_model())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


EXIT_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[EXIT_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process without C++ destructors where Ray has been in it.

    Ray 2.60 ends its metrics exporter with the first Ray of a process only. These tests start several; the
    exporter left over wakes every few seconds, and crashes where it finds its objects destroyed.
    """
    if "ray" in sys.modules and EXIT_STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[EXIT_STATUS])
