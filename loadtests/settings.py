"""Settings of a replay. Imports neither Locust nor httpx."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_NAMES = (
    "url",
    "model",
    "endpoint",
    "seed",
    "request_timeout_s",
    "connect_timeout_s",
    "straggler_s",
    "progress_s",
)


def _key_from_environment() -> str | None:
    return os.environ.get("OPENAI_API_KEY")


@dataclass(frozen=True)
class ReplaySettings:
    """Where and how to send a trace. Times in seconds.

    ``straggler_s``: how long after the last arrival answers are waited for. ``seed`` makes the prompts.
    ``ignore_eos`` asks the server (a vLLM extension) to generate exactly the traced length. The key comes
    from OPENAI_API_KEY and is never printed.
    """

    url: str
    model: str
    endpoint: str = "chat"
    seed: int = 0
    ignore_eos: bool = True
    request_timeout_s: float = 300.0
    connect_timeout_s: float = 10.0
    straggler_s: float = 120.0
    progress_s: float = 3.0
    api_key: str | None = field(default_factory=_key_from_environment, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; give one such as http://127.0.0.1:8000")
        if self.endpoint not in ENDPOINTS:
            raise ValueError(f"endpoint is {self.endpoint!r}; give one of {', '.join(ENDPOINTS)}")
        if not self.model:
            raise ValueError("model is empty; give the name that the server lists at /v1/models")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed!r}; give a whole number of at least 0")
        for name in ("request_timeout_s", "connect_timeout_s", "straggler_s", "progress_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give seconds greater than 0")

    @classmethod
    def from_arguments(cls, options: argparse.Namespace) -> ReplaySettings:
        """The settings that the replay command's options name."""
        values = {name: getattr(options, name) for name in _NAMES}
        return cls(**values, ignore_eos=not options.no_ignore_eos)

    def to_arguments(self) -> list[str]:
        """Options of the replay command that give these settings; the key travels in the environment."""
        arguments = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in _NAMES]
        return arguments if self.ignore_eos else [*arguments, "--no-ignore-eos"]

    def to_dict(self) -> dict[str, Any]:
        """What to keep beside results: all but the key."""
        return {name: getattr(self, name) for name in (*_NAMES, "ignore_eos")}

    @property
    def base_url(self) -> str:
        """The URL without a trailing slash or ``/v1``."""
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        """The endpoint's path."""
        return ENDPOINTS[self.endpoint]
