"""A streaming OpenAI-shaped server with known delays, in a process of its own.

``python dummy_server.py PORT LOG [JSON]``. Each answer of ``n`` tokens is written as: headers, a role chunk,
then after ``ttft_s`` the first token and every ``itl_s`` another, then usage and ``[DONE]``. The moments on
``time.monotonic`` at which each request came and each token was handed to the socket are appended to LOG, so
that a test compares the client's clock with the server's, not with what was planned. ``faults`` maps the
number of a request, in order of arrival, to a way to fail.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "dummy"


class Server:
    def __init__(self, log: Path, plan: dict[str, Any]) -> None:
        self.log = log
        self.ttft_s = float(plan.get("ttft_s", 0.05))
        self.itl_s = float(plan.get("itl_s", 0.02))
        self.faults: dict[str, str] = plan.get("faults", {})
        self.fp8_from: int = plan.get("fp8_from", 1 << 30)
        self.seen = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came = time.monotonic()
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET /v1/models"):
                await self.plain(writer, 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            else:
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                await self.answer(writer, came, head.split()[1], headers, body)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def plain(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode() if not isinstance(body, str) else body.encode()
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def answer(
        self,
        writer: asyncio.StreamWriter,
        came: float,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any],
    ) -> None:
        number, self.seen = self.seen, self.seen + 1
        fault = self.faults.get(str(number))
        if fault == "500":
            return await self.plain(writer, 500, {"error": {"message": "the engine is dead", "code": 500}})
        if fault == "503":
            return await self.plain(writer, 503, "overloaded, in plain text")
        if fault == "refuse":
            return None
        precision = "fp8" if number >= self.fp8_from else "fp16"
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            + f"x-nestedfp-precision-at-start: {precision}\r\n".encode()
            + f"x-nestedfp-replica: r{number % 2}\r\n\r\n".encode()
        )
        chat = path.endswith("chat/completions")
        if chat:
            self.event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await writer.drain()
        if fault == "hang":
            await asyncio.sleep(600)
        wrote = []
        for token in range(body["max_tokens"]):
            await asyncio.sleep(self.ttft_s if token == 0 else self.itl_s)
            if fault == "abort" and token == 2:
                return None
            if fault == "error" and token == 2:
                self.event(writer, {"error": {"message": "out of blocks", "code": 500}})
                break
            choice = {"delta": {"content": " w"}} if chat else {"text": " w"}
            wrote.append(time.monotonic())
            self.event(writer, {"id": f"cmpl-{number}", "choices": [choice]})
            await writer.drain()
        usage = {
            "prompt_tokens": 7,
            "completion_tokens": len(wrote),
            "nestedfp": {"fp16": 7 if precision == "fp16" else 0, "fp8": 0 if precision == "fp16" else 7},
        }
        if fault != "no usage":
            self.event(writer, {"choices": [], "usage": usage})
        # Before the end of the answer, so that whoever read the answer can read the log.
        entry = {
            "number": number,
            "came": came,
            "wrote": wrote,
            "path": path,
            "headers": headers,
            "body": body,
        }
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if fault != "no done":
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return None

    @staticmethod
    def event(writer: asyncio.StreamWriter, chunk: dict[str, Any]) -> None:
        data = f"data: {json.dumps(chunk)}\n\n".encode()
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


async def main() -> None:
    log = Path(sys.argv[2])
    server = Server(log, json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})
    listening = await asyncio.start_server(server.handle, "127.0.0.1", int(sys.argv[1]))
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
