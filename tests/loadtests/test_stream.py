from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestedfp.loadtests.stream import EventDecoder, TokenStream


def event(chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def token(text: str = "a", **more: object) -> bytes:
    return event({"id": "cmpl-1", "choices": [{"text": text}], **more})


DONE = b"data: [DONE]\n\n"
ROLE = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_events_do_not_depend_on_how_the_bytes_are_cut(texts: list[str], end: str, cuts: list[int]) -> None:
    whole = "".join(f": ping{end}event: x{end}data: {text}{end}{end}" for text in texts).encode()
    bounds = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    decoder = EventDecoder()
    events = [text for start, stop in pairwise(bounds) for text in decoder.feed(whole[start:stop])]
    assert events == texts


def test_lines_of_one_event_are_joined() -> None:
    assert EventDecoder().feed(b"data: a\ndata:b\n\n") == ["a\nb"]


def test_a_whole_answer() -> None:
    stream = TokenStream()
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "nestedfp": {"fp16": 3, "fp8": 2}}
    for now, block in [
        (1.0, token()),
        (2.0, token("")),
        (3.0, event({"choices": [], "usage": usage}) + DONE),
    ]:
        stream.feed(block, now)
    assert stream.token_times == [1.0, 2.0]
    assert stream.problem is None
    assert stream.usage_count("completion_tokens") == 2
    assert stream.tokens_by_precision == {"fp16": 3, "fp8": 2}
    assert stream.request_id == "cmpl-1"


def test_the_chunk_that_only_opens_a_chat_message_is_not_a_token() -> None:
    stream = TokenStream()
    stream.feed(ROLE, 1.0)
    stream.feed(event({"choices": [{"delta": {"role": "assistant", "content": "hi"}}]}), 2.0)
    stream.feed(event({"choices": [{"delta": {"content": ""}}]}), 3.0)
    assert stream.token_times == [2.0, 3.0]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (token(), "the stream ended before [DONE]"),
        (ROLE + DONE, "the stream held no token"),
        (DONE, "the stream held no token"),
        (token() + event({"error": {"message": "out of blocks"}}) + DONE, "out of blocks"),
        (token() + event({"error": "plain"}) + DONE, "plain"),
        (b"data: {\n\n" + DONE, "an event is not a JSON object: '{'"),
        (b"data: [1]\n\n" + DONE, "an event is not a JSON object: '[1]'"),
        (b"", "the stream ended before [DONE]"),
    ],
)
def test_an_incomplete_answer_says_why(body: bytes, problem: str) -> None:
    stream = TokenStream()
    stream.feed(body, 0.0)
    assert stream.problem == problem


@pytest.mark.parametrize("usage", [None, {}, {"nestedfp": 5}, {"nestedfp": {"fp16": "x"}}])
def test_missing_or_odd_usage_is_none(usage: object) -> None:
    stream = TokenStream()
    stream.feed(event({"choices": [], "usage": usage}), 0.0)
    assert stream.tokens_by_precision is None
    assert stream.usage_count("completion_tokens") is None
