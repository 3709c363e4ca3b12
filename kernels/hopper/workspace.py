"""Scratch memory for products whose CTAs wait for one another: one per device, for all products.

Products of one device run one after another on a stream, and each leaves the counters at zero. Two at once,
on two streams or of two processes that share a device without time slicing, would each hold a part of the
multiprocessors and wait for the rest.
"""

from functools import cache

import torch
from torch import Tensor

SCRATCH_FLOATS = 132 * 2 * 128 * 256
"""Two tiles of 128 x 256 for each multiprocessor of an H100: 35 MB."""

SCRATCH_COUNTERS = 132 * 8
"""One for each consumer of each split tile."""


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(partials, counters): float32 and zeroed int32. First called outside graph capture."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first product on a device allocates its workspace and cannot be captured; run one before"
        )
    partials = torch.empty(SCRATCH_FLOATS, dtype=torch.float32, device=device)
    return partials, torch.zeros(SCRATCH_COUNTERS, dtype=torch.int32, device=device)
