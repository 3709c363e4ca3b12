"""Makes the helpers beside the tests importable, here and in the processes that the tests start."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fresh_layers() -> Iterator[None]:
    """No layer is known before and after, and nothing is staged after."""
    from nestedfp.vllm.active import ACTIVE
    from nestedfp.vllm.linear import STAGING

    ACTIVE.clear()
    yield
    ACTIVE.clear()
    STAGING.release()
