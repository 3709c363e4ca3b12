"""Scratch memory for products whose K is split: one per device, reused by every product of every kernel.

Products of one device run one after another on a stream, and each leaves the counters at zero.
"""

from functools import cache

import torch
from torch import Tensor

# Two slots a multiprocessor of 128 x 256 float32, or one of the largest tile, 256 x 192.
_SLOT_FLOATS = 2 * 128 * 256
# A counter for each consumer of each tile of the last two waves, at two programs a multiprocessor; flags of
# workers need fewer.
_COUNTERS = 2 * 2 * 2


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(partials, counters): float32 and zeroed int32. First called outside graph capture."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first product on a device allocates its workspace and cannot be captured; run one before"
        )
    partials = torch.empty(multiprocessors * _SLOT_FLOATS, dtype=torch.float32, device=device)
    counters = torch.zeros(multiprocessors * _COUNTERS, dtype=torch.int32, device=device)
    return partials, counters
