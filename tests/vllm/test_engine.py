"""The plugin in a real vLLM engine on the CPU, against plain vLLM and against itself after flips."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from greedy_reference import ENVIRONMENT, PROMPTS, Greedy, completion, engine_settings, sampling

from nestedfp.vllm import engine_arguments
from nestedfp.vllm.control import PRECISION_ARGUMENT, STRICT_CACHE_SALT, EngineControl

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="module"),
]

NEAR_TIE = 0.0625
"""Logits near 20 are 1/64 apart in float16; two of them, each a few roundings off, may change places."""

PROSE = Path(__file__).with_name("prose.txt")
FLIPS = 100
LOAD_TOKENS = 600
AGAIN = 5
"""Prompts repeated after the flips."""


@pytest.fixture(scope="module")
def plain(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Plain vLLM's greedy completions, awaited: the process runs while the nested engine starts."""
    out = tmp_path_factory.mktemp("plain") / "greedy.json"
    program = Path(__file__).with_name("greedy_reference.py")
    process = subprocess.Popen(
        [sys.executable, str(program), model_path, str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def results() -> list[Greedy]:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors.decode()[-2000:]
        return [Greedy(**entry) for entry in json.loads(out.read_text())]

    yield results
    process.kill()


class Client:
    """A nested engine, its control, and requests to it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.control = EngineControl(engine)
        self._epoch = 0
        self._requests = 0

    async def target(self, mode: str) -> None:
        self._epoch += 1
        await self.control.set_target(mode, epoch=self._epoch, reason="test")

    async def request(self, prompt: str, salt: str = "", **sampling_arguments: Any) -> tuple[str, Any]:
        """The request's id and its final output."""
        from vllm import SamplingParams

        self._requests += 1
        request_id = f"cmpl-{self._requests}"
        text = {"prompt": prompt, "cache_salt": salt} if salt else {"prompt": prompt}
        last = None
        async for output in self.engine.generate(text, SamplingParams(**sampling_arguments), request_id):
            last = output
        return request_id, last

    async def greedy(self, prompt: str) -> Greedy:
        _, output = await self.request(prompt, **sampling())
        return completion(output.outputs[0])

    async def best_tokens(self, text: str) -> list[int]:
        """At each position of `text`, the token that the model holds most likely to come next."""
        _, output = await self.request(text, temperature=0.0, max_tokens=1, prompt_logprobs=1)
        return [
            min(candidates, key=lambda token: candidates[token].rank)
            for candidates in output.prompt_logprobs[1:]
        ]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(plain: Any, model_path: str) -> AsyncIterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = {**engine_settings(model_path), **engine_arguments("cpu")}
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        yield Client(engine)
        engine.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def before_flips(client: Client) -> list[Greedy]:
    return [await client.greedy(prompt) for prompt in PROMPTS]


async def test_every_layer_of_the_model_is_nested(client: Client) -> None:
    status = await client.control.status()
    assert status.layers == {"nested": 120, "plain": 0}


async def test_fp16_tokens_equal_plain_vllm(
    before_flips: list[Greedy], plain: Any, record_property: Callable[[str, object], None]
) -> None:
    near_ties = 0
    for prompt, ours, theirs in zip(PROMPTS, before_flips, plain(), strict=True):
        if ours.token_ids == theirs.token_ids:
            continue
        pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
        position = next(index for index, (one, other) in enumerate(pairs) if one != other)
        lead = theirs.leads[position]
        assert lead <= NEAR_TIE, f"{prompt!r} diverges at token {position}, where plain vLLM leads by {lead}"
        near_ties += 1
    record_property("near_ties", near_ties)
    print(f"{len(PROMPTS) - near_ties} of {len(PROMPTS)} completions equal, {near_ties} parted at a near tie")
    assert near_ties <= len(PROMPTS) // 5


async def test_fp8_agrees_with_fp16_on_most_next_tokens(client: Client) -> None:
    text = PROSE.read_text()
    await client.target("fp16")
    exact = await client.best_tokens(text)
    await client.target("fp8")
    rounded = await client.best_tokens(text)
    assert len(exact) == len(rounded) > 400
    agreement = sum(a == b for a, b in zip(exact, rounded, strict=True)) / len(exact)
    print(f"FP8 agrees with FP16 on {agreement:.1%} of {len(exact)} next tokens")
    assert 0.9 <= agreement < 1


async def test_fp16_is_identical_after_many_flips_under_load(
    client: Client, before_flips: list[Greedy]
) -> None:
    start = await client.control.status()
    load = [
        asyncio.create_task(client.request(prompt, temperature=0.0, max_tokens=LOAD_TOKENS, ignore_eos=True))
        for prompt in PROMPTS[:4]
    ]
    status, mode = start, "fp16"
    while status.flips < start.flips + FLIPS:
        mode = "fp8" if mode == "fp16" else "fp16"
        await client.target(mode)
        status = await client.control.status()
        steps = sum(status.steps.values())
        while sum(status.steps.values()) == steps and not all(task.done() for task in load):
            status = await client.control.status()
        assert not all(task.done() for task in load), f"the load ended after {status.flips} flips"
    for request_id, output in await asyncio.gather(*load):
        tokens = await client.control.take_request_tokens(request_id)
        assert tokens is not None
        assert min(tokens.values()) > 0
        # Every token but the last was fed back; the prompt was computed or, in part, found in the cache.
        assert LOAD_TOKENS <= sum(tokens.values()) < len(output.prompt_token_ids) + LOAD_TOKENS
    assert status.mixed_steps == 0
    assert status.last_flip_seconds is not None
    assert status.last_flip_seconds < 0.001

    await client.target("fp16")
    # Blocks that were computed in FP8 would be reused: that is the default, and not what is tested here.
    await client.engine.reset_prefix_cache()
    again = [await client.greedy(prompt) for prompt in PROMPTS[:AGAIN]]
    assert again == before_flips[:AGAIN]


async def test_reloading_the_checkpoint_changes_no_token(client: Client, before_flips: list[Greedy]) -> None:
    await client.target("fp16")
    await client.engine.collective_rpc("reload_weights")
    await client.engine.reset_prefix_cache()
    assert [await client.greedy(prompt) for prompt in PROMPTS[:2]] == before_flips[:2]
    assert (await client.control.status()).mixed_steps == 0


async def test_a_strict_request_runs_in_16_bits_whatever_the_target(client: Client) -> None:
    await client.target("fp8")
    before = await client.control.status()
    request_id, _ = await client.request(
        PROMPTS[0],
        salt=STRICT_CACHE_SALT,
        temperature=0.0,
        max_tokens=8,
        ignore_eos=True,
        extra_args={PRECISION_ARGUMENT: "fp16"},
    )
    other_id, _ = await client.request(PROMPTS[1], temperature=0.0, max_tokens=8, ignore_eos=True)
    strict = await client.control.take_request_tokens(request_id)
    other = await client.control.take_request_tokens(other_id)
    assert strict is not None
    assert other is not None
    assert strict["fp8"] == 0 < strict["fp16"]
    assert other["fp16"] == 0 < other["fp8"]
    after = await client.control.status()
    assert after.tokens["fp16"] - before.tokens["fp16"] == strict["fp16"]
    assert after.strict_running == 0


async def test_auto_flips_by_itself_and_returns(client: Client) -> None:
    epoch = (await client.control.status()).epoch + 1
    client._epoch = epoch
    limits = {"tokens_high": 64, "tokens_low": 32, "min_steps": 4}
    await client.control.set_target("auto", epoch=epoch, limits=limits)
    long_prompt = PROSE.read_text()[:600]
    request_id, _ = await client.request(long_prompt, temperature=0.0, max_tokens=8, ignore_eos=True)
    tokens = await client.control.take_request_tokens(request_id)
    assert tokens is not None
    assert tokens["fp8"] > 64
    assert tokens["fp16"] == 4
    status = await client.control.status()
    assert status.last_flip_reason == "auto: tokens, waiting and kv_usage below their low marks"
