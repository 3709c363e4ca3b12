"""An engine's status, for tests that care about some of its fields."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nestedfp.vllm.status import EngineStatus


def engine_status(**changes: Any) -> EngineStatus:
    """Of an idle engine in 16 bits, but for `changes`."""
    idle = EngineStatus(
        mode="fp16",
        epoch=0,
        current="fp16",
        steps={},
        tokens={},
        flips=0,
        last_flip_seconds=None,
        last_flip_reason=None,
        mixed_steps=None,
        running=0,
        waiting=0,
        waiting_prompt_tokens=0,
        oldest_waiting_s=0.0,
        kv_usage=0.0,
        step_time_s={},
        layers={},
        plain_reasons={},
        strict_running=0,
        at=0.0,
    )
    return replace(idle, **changes)
