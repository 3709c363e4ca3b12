"""Drives an ASGI application message by message, as a server would."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nestedfp.deployments.asgi import App, Headers, Message


@dataclass
class Answer:
    """What an application sent, in order."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        status: int = self.messages[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


def scope_of(method: str, path: str, headers: Headers | None = None) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "root_path": "", "headers": headers or []}


async def ask(
    app: App, method: str, path: str, *, headers: Headers | None = None, body: tuple[bytes, ...] = (b"",)
) -> Answer:
    """One request; `body` holds the chunks in which it comes. After them the client has gone."""
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": index < len(body) - 1}
        for index, part in enumerate(body)
    ]
    answer = Answer()

    async def receive() -> Message:
        return incoming.pop(0) if incoming else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answer.messages.append(message)

    await app(scope_of(method, path, headers), receive, send)
    return answer
