"""The part of the OpenAI API that a simulated engine can answer: models, completions, chat, streamed or not.

There is no tokenizer and no text: a prompt of token ids counts as it is, a text counts its words, and every
output token is the same word. An answer is as long as `max_tokens` says. Each answer names the simulation in
`system_fingerprint`, and `usage.simulated` holds its times from the arrival on; with `"token_times": true`
in the request also those of every token and the precision of its step.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from nestedfp.deployments.admission import HEALTH, is_strict, route
from nestedfp.deployments.arrival import arrived_at
from nestedfp.deployments.asgi import Receive, Scope, Send, retry_after, send_error, send_json
from nestedfp.deployments.simulated_engine import Generation, NeverFits, Refused, SimulatedEngine

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
MODELS: Final = "/v1/models"
_WORD: Final = " word"
_DEFAULT_OUTPUT: Final = 16
_REMEMBERED: Final = 4096
_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8")]


class BadRequest(ValueError):
    """A request that cannot be served as it is: HTTP status, kind of error, parameter."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.kind = "NotFoundError" if status == 404 else "BadRequestError"


@dataclass(frozen=True, slots=True)
class _Request:
    prompt_tokens: int
    output_tokens: int
    stream: bool
    include_usage: bool
    token_times: bool


class SimulatedOpenAI:
    """ASGI application on a :class:`SimulatedEngine`; stands behind the same door as vLLM's own."""

    def __init__(
        self,
        engine: SimulatedEngine,
        *,
        model: str,
        max_model_len: int,
        stream_interval: int,
        retry_after_s: int,
        label: str,
    ) -> None:
        self._engine = engine
        self._model = model
        self._max_model_len = max_model_len
        self._stream_interval = stream_interval
        self._retry_after_s = retry_after_s
        self._label = label
        self._tokens: OrderedDict[str, Mapping[str, int]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        path = route(scope)
        if path == HEALTH:
            await send_json(send, 200, b"{}")
        elif path == MODELS:
            card = {
                "id": self._model,
                "object": "model",
                "owned_by": self._label,
                "max_model_len": self._max_model_len,
            }
            await send_json(send, 200, _dump({"object": "list", "data": [card]}))
        elif path in (CHAT, COMPLETIONS):
            await self._generate(scope, receive, send, chat=path == CHAT)
        else:
            message = f"A simulated engine does not answer {path}."
            await send_error(send, 404, message, "NotFoundError")

    def take_tokens(self, request_id: str) -> Mapping[str, int] | None:
        """Tokens of an answered request by precision, once; None for one not known."""
        return self._tokens.pop(request_id, None)

    async def _generate(self, scope: Scope, receive: Receive, send: Send, *, chat: bool) -> None:
        try:
            request = self._read((await receive()).get("body", b""), chat=chat)
            now_s = time.time()
            generation = self._engine.submit(
                request.prompt_tokens,
                request.output_tokens,
                strict=is_strict(scope),
                age_s=now_s - (arrived_at() or now_s),
            )
        except BadRequest as error:
            await send_error(send, error.status, str(error), error.kind, param=error.param)
            return
        except NeverFits as error:
            await send_error(send, 400, str(error), "BadRequestError", param="max_tokens")
            return
        except Refused as error:
            later = retry_after(self._retry_after_s)
            await send_error(send, 503, str(error), "ServiceUnavailableError", headers=later)
            return
        answer = _Answer(self._model, self._label, chat=chat, stream=request.stream)
        gone = asyncio.create_task(_disconnected(receive))
        try:
            if request.stream:
                await self._stream(request, generation, answer, gone, send)
            elif await _settled(generation, request.output_tokens, gone):
                self._remember(answer.id, generation)
                await send_json(send, 200, _dump(answer.whole(generation, request.token_times)))
        finally:
            gone.cancel()
            self._engine.abort(generation)

    async def _stream(
        self,
        request: _Request,
        generation: Generation,
        answer: _Answer,
        gone: asyncio.Task[None],
        send: Send,
    ) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        async for made in _progress(generation, self._stream_interval, gone):
            chunk = answer.piece(made, last=generation.done)
            await send({"type": "http.response.body", "body": _event(chunk), "more_body": True})
        if not generation.done:
            return
        self._remember(answer.id, generation)
        if request.include_usage:
            usage = answer.usage_chunk(generation, request.token_times)
            await send({"type": "http.response.body", "body": _event(usage), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _remember(self, request_id: str, generation: Generation) -> None:
        self._tokens[request_id] = generation.tokens
        while len(self._tokens) > _REMEMBERED:
            self._tokens.popitem(last=False)

    def _read(self, body: bytes, *, chat: bool) -> _Request:
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"The body is not JSON: {error}") from None
        if not isinstance(given, dict):
            raise BadRequest("The body must be a JSON object.")
        if given.get("model") not in (None, self._model):
            raise BadRequest(f"The model {given['model']!r} does not exist.", "model", 404)
        if given.get("n") not in (None, 1):
            raise BadRequest(f"n is {given['n']!r}; a simulated engine gives one answer.", "n")
        prompt_tokens = _chat_length(given) if chat else _prompt_length(given)
        output = next(
            (given[name] for name in ("max_completion_tokens", "max_tokens") if given.get(name) is not None),
            _DEFAULT_OUTPUT,
        )
        if isinstance(output, bool) or not isinstance(output, int) or output < 1:
            raise BadRequest(f"max_tokens is {output!r}; give a whole number of at least 1.", "max_tokens")
        if prompt_tokens + output > self._max_model_len:
            message = f"{prompt_tokens} + {output} tokens exceed the model's {self._max_model_len}."
            raise BadRequest(message, "max_tokens")
        options = given.get("stream_options")
        return _Request(
            prompt_tokens=prompt_tokens,
            output_tokens=output,
            stream=given.get("stream") is True,
            include_usage=isinstance(options, dict) and options.get("include_usage") is True,
            token_times=given.get("token_times") is True,
        )


class _Answer:
    """One answer in OpenAI's shapes."""

    def __init__(self, model: str, label: str, *, chat: bool, stream: bool) -> None:
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._chat = chat
        self._label = label
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": label,
        }

    def piece(self, tokens: int, *, last: bool) -> dict[str, Any]:
        text = _WORD * tokens
        content = {"delta": {"content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": "length" if last else None}
        return {**self._head, "choices": [choice]}

    def whole(self, generation: Generation, token_times: bool) -> dict[str, Any]:
        text = _WORD * generation.output_tokens
        message = {"role": "assistant", "content": text}
        content: dict[str, Any] = {"message": message} if self._chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": "length"}
        return {**self._head, "choices": [choice], "usage": self._usage(generation, token_times)}

    def usage_chunk(self, generation: Generation, token_times: bool) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": self._usage(generation, token_times)}

    def _usage(self, generation: Generation, token_times: bool) -> dict[str, Any]:
        simulated: dict[str, Any] = {
            "label": self._label,
            "ttft_s": generation.ttft_s,
            "tpot_s": generation.tpot_s,
        }
        if token_times:
            simulated |= {
                "arrival_s": generation.arrival_s,
                "queued_s": generation.queued_s,
                "token_s": generation.token_s,
                "token_modes": generation.token_modes,
            }
        return {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.output_tokens,
            "total_tokens": generation.prompt_tokens + generation.output_tokens,
            "simulated": simulated,
        }


async def _progress(generation: Generation, interval: int, gone: asyncio.Task[None]) -> AsyncIterator[int]:
    """Numbers of new tokens: the first alone, then `interval` at a time, then the rest."""
    sent = 0
    while sent < generation.output_tokens:
        wanted = min(generation.output_tokens, 1 if sent == 0 else sent + interval)
        if not await _settled(generation, wanted, gone):
            return
        made = len(generation.token_s)
        yield made - sent
        sent = made


async def _settled(generation: Generation, tokens: int, gone: asyncio.Task[None]) -> bool:
    """Wait until `tokens` tokens are there; False where the client left first."""
    generation.wanted = tokens
    while len(generation.token_s) < tokens:
        generation.changed.clear()
        changed = asyncio.create_task(generation.changed.wait())
        try:
            await asyncio.wait((changed, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if gone.done():
            return False
    return True


async def _live(receive: Receive, send: Send) -> None:
    """Answer the server's start and stop: there is nothing to do at either."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _prompt_length(given: Mapping[str, Any]) -> int:
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return max(1, len(prompt.split()))
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return len(prompt)
    raise BadRequest("prompt must be a text or a list of token ids.", "prompt")


def _chat_length(given: Mapping[str, Any]) -> int:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of messages.", "messages")
    return max(1, sum(len(str(message.get("content", "")).split()) for message in messages))


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"
