"""The token stream of one answer: server-sent events of the OpenAI API, read incrementally and timed.

Pure: bytes and the moment they came go in, times and counts come out. A chunk counts as tokens if it has a
choice, as in ``vllm bench serve``, with one difference: the chunk that only opens a chat message (a role and
no text) does not, because a proxy may send it long before the first token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

DONE = "[DONE]"


class EventDecoder:
    """Splits a byte stream into the data of its server-sent events, wherever the blocks are cut.

    Lines end in LF or CRLF; comments, event names and ids are dropped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []

    def feed(self, block: bytes) -> list[str]:
        """The data of the events that this block completes."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        events = []
        for line in lines:
            text = line.removesuffix(b"\r").decode("utf-8", errors="replace")
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                events.append("\n".join(self._data))
                self._data = []
        return events


@dataclass
class TokenStream:
    """Collects one answer. ``token_times`` are the moments given to :meth:`feed`, one a chunk with tokens."""

    token_times: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    request_id: str | None = None
    error: str | None = None
    done: bool = False
    _decoder: EventDecoder = field(default_factory=EventDecoder)

    def feed(self, block: bytes, now: float) -> None:
        """Take a block of the response body that came at ``now`` (seconds on any one clock)."""
        for event in self._decoder.feed(block):
            if event == DONE:
                self.done = True
            elif not self.done:
                self._take(event, now)

    @property
    def problem(self) -> str | None:
        """Why the answer, at the end of its stream, is not a complete one; None if it is."""
        if self.error is not None:
            return self.error
        if not self.done:
            return f"the stream ended before {DONE}"
        return None if self.token_times else "the stream held no token"

    def usage_count(self, name: str) -> int | None:
        """A count of the final ``usage``, if the server sent one."""
        value = (self.usage or {}).get(name)
        return value if isinstance(value, int) else None

    @property
    def tokens_by_precision(self) -> dict[str, int] | None:
        """``usage.nestedfp``: tokens computed in each precision, if the server sent it."""
        counts = (self.usage or {}).get("nestedfp")
        if not isinstance(counts, dict) or not all(isinstance(n, int) for n in counts.values()):
            return None
        return {"fp16": counts.get("fp16", 0), "fp8": counts.get("fp8", 0)}

    def _take(self, event: str, now: float) -> None:
        try:
            chunk = json.loads(event)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self.error = self.error or f"an event is not a JSON object: {event[:200]!r}"
            return
        if chunk.get("error"):
            self.error = self.error or error_text(chunk)
            return
        if self.request_id is None and isinstance(chunk.get("id"), str):
            self.request_id = chunk["id"]
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices and not _opens_message(choices[0]):
            self.token_times.append(now)


def error_text(body: object) -> str:
    """The message of an OpenAI-shaped error body, or the body itself."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message") if isinstance(error, dict) else None
    return str(message if message else error)[:500]


def _opens_message(choice: object) -> bool:
    if not isinstance(choice, dict) or choice.get("finish_reason"):
        return False
    delta = choice.get("delta")
    if not isinstance(delta, dict) or "role" not in delta:
        return False
    return not any(value for name, value in delta.items() if name != "role")
