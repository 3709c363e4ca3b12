from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestedfp.loadtests.outcome import Outcome
from nestedfp.loadtests.records import read_requests
from nestedfp.loadtests.replay import EXIT_CUT_SHORT, ReplayError, add_arguments, main, replay, start_replay
from nestedfp.loadtests.settings import ReplaySettings
from nestedfp.loadtests.traces import Trace

MODEL = "dummy"


def even_trace(requests: int, gap_s: float, output_tokens: int = 8) -> Trace:
    arrivals = [0.1 + gap_s * index for index in range(requests)]
    strict = [index % 4 == 3 for index in range(requests)]
    return Trace.from_columns("even", arrivals, [12] * requests, [output_tokens] * requests, strict)


def settings(url: str, **changes: Any) -> ReplaySettings:
    return ReplaySettings(url, MODEL, progress_s=0.5, **changes)


def test_an_open_load_is_timed_within_5_ms_of_the_servers_clock(
    dummy: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server = dummy(ttft_s=1.5, itl_s=0.05, fp8_from=10)
    out = tmp_path / "requests.jsonl"
    seen: list[Outcome] = []
    trace = even_trace(20, 0.05)
    outcome = replay(trace, settings(server.url), out, on_start=seen.append)

    assert (outcome.sent, outcome.ok, outcome.failed, outcome.unsent) == (20, 20, 0, 0)
    assert outcome.finished
    assert outcome.cut_short is None
    assert seen[0].started_monotonic == outcome.started_monotonic
    assert seen[0].started_unix == pytest.approx(outcome.started_unix, abs=0.1)
    assert "sent 20/20  ok 20  failed 0" in capfd.readouterr().out

    answered = server.answered()
    ttft_errors, itl_errors = [], []
    records = read_requests(out)
    for record, request in zip(records, trace, strict=True):
        number = int(record.request_id.split("-")[1])  # type: ignore[union-attr]
        entry = answered[number]
        wrote = np.array(entry["wrote"])
        assert record.ttft_s is not None
        ttft_errors.append(record.scheduled_s + record.ttft_s + outcome.started_monotonic - wrote[0])
        itl_errors += list(np.array(record.itl_s) - np.diff(wrote))
        assert record.scheduled_s == pytest.approx(request.arrival_s)
        assert record.lag_s == pytest.approx(record.sent_s - record.scheduled_s)
        assert record.tpot_s == pytest.approx(sum(record.itl_s) / 7)
        assert record.e2el_s == pytest.approx(record.ttft_s + sum(record.itl_s))
        assert (record.prompt_tokens, record.output_tokens, record.status) == (7, 8, 200)
        assert record.precision_at_start == ("fp8" if number >= 10 else "fp16")
        assert record.replica == f"r{number % 2}"
        assert record.tokens_by_precision == {"fp16": 7 * (number < 10), "fp8": 7 * (number >= 10)}
        assert entry["headers"]["x-nestedfp-precision"] == request.precision_class
    # Open: all were sent before the first was answered.
    assert max(r.sent_s for r in records) < min(r.scheduled_s + (r.ttft_s or 0) for r in records)
    # A loaded machine wakes the client late, which it measures; a client that buffers is late by far more.
    assert outcome.client_delay_ms is not None
    allowed = max(0.005, outcome.client_delay_ms["p99"] / 1e3)
    assert np.median(np.abs(ttft_errors)) < allowed
    assert np.median(np.abs(itl_errors)) < allowed


def test_slow_answers_are_ended_at_their_limit_and_stragglers_at_the_end(
    dummy: Callable[..., Any], tmp_path: Path
) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.01, faults={"0": "500", "4": "hang", "18": "hang"})
    out = tmp_path / "requests.jsonl"
    outcome = replay(even_trace(20, 0.1), settings(server.url, request_timeout_s=2.0, straggler_s=1.5), out)
    # Not by index: a loaded machine may send neighbours together, and the server counts arrivals.
    assert sorted(record.error or "" for record in read_requests(out) if not record.ok) == [
        "the engine is dead",
        "unfinished 1.5 s after the last arrival",
        "unfinished 2 s after it was sent",
    ]
    assert outcome.cut_short == "unfinished 1.5 s after the last arrival"
    assert (outcome.ok, outcome.failed, outcome.unsent) == (17, 3, 0)


def test_ctrl_c_ends_the_replay_cleanly(dummy: Callable[..., Any], tmp_path: Path) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.05)
    out = tmp_path / "requests.jsonl"
    process = start_replay(even_trace(600, 0.1, output_tokens=40), settings(server.url), out)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (out.exists() and out.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == EXIT_CUT_SHORT
    outcome = Outcome.read(out)
    records = read_requests(out)
    assert outcome.cut_short == "the replay was ended by SIGINT"
    assert outcome.sent == len(records) == outcome.ok + outcome.failed
    assert outcome.ok > 0
    assert outcome.failed > 0
    assert outcome.unsent == 600 - outcome.sent > 0
    assert {record.error for record in records if not record.ok} == {outcome.cut_short}


def replays_into(folder: Path) -> list[int]:
    """Processes of the replay command that write into ``folder``."""
    needles = (b"nestedfp.loadtests.replay", str(folder).encode())
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if all(needle in command for needle in needles):
            found.append(int(path.parent.name))
    return found


def test_an_exception_in_the_caller_ends_the_process(dummy: Callable[..., Any], tmp_path: Path) -> None:
    server = dummy()
    pids: list[int] = []

    def fail(outcome: Outcome) -> None:
        pids.extend(replays_into(tmp_path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replay(even_trace(600, 0.1), settings(server.url), tmp_path / "requests.jsonl", on_start=fail)
    assert len(pids) == 1
    assert not replays_into(tmp_path)
    assert Outcome.read(tmp_path / "requests.jsonl").cut_short == "the replay was ended by SIGTERM"


def test_a_silent_endpoint_is_told_before_anything_is_sent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ReplayError):
        replay(even_trace(2, 0.1), settings("http://127.0.0.1:9"), tmp_path / "requests.jsonl")
    assert "error: no answer from http://127.0.0.1:9" in capfd.readouterr().err


def test_the_command_replays_a_file_and_records_what_it_did_to_it(
    dummy: Callable[..., Any], tmp_path: Path
) -> None:
    server = dummy(ttft_s=0.01, itl_s=0.0)
    source = tmp_path / "azure.csv"
    rows = [f"2024-05-10 00:00:{n:02d}.000000+00:00,{1000 + n},{10 + n}" for n in range(10)]
    source.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    out = tmp_path / "run" / "requests.jsonl"
    command = f"""--url {server.url}/v1 --model {MODEL} --trace {source} --out {out} --window 2 6 --requests 5
        --time-scale 0.1 --length-scale 0.5 --max-prompt-tokens 100 --strict-share 0.5 --locust-table"""
    done = subprocess.run(
        [sys.executable, "-m", "nestedfp.loadtests.replay", *command.split()],
        capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "OPENAI_API_KEY": "secret"},
    )  # fmt: skip
    records = read_requests(out)
    assert [record.scheduled_s for record in records] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [record.max_tokens for record in records] == [6, 6, 7, 8, 8]
    assert {record.trace_prompt_tokens for record in records} == {100}
    assert {entry["headers"]["authorization"] for entry in server.answered().values()} == {"bearer secret"}
    history = Outcome.read(out).trace["history"]
    assert [note.split(" (")[0] for note in history] == [
        "Azure LLM inference trace",
        "window 2 s + 6 s",
        "first 5 requests",
        "time x 0.1",
        "lengths x 0.5",
        "prompt_tokens cut to 100 in 5 requests",
        "strict share 0.5",
    ]
    assert "TTFT" in done.stdout  # Locust's table
    assert "secret" not in done.stdout + done.stderr + Outcome.path_beside(out).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--url ftp://x --model m", "url is 'ftp://x'"),
        ("--model m --trace nowhere.csv", "nowhere.csv"),
        ("--model m --straggler-s 0", "straggler_s is 0.0"),
        ("--model m --time-scale -1", "time scale is -1.0"),
        ("--model m --requests 0", "requests is 0"),
        ("--model m --seed -1", "seed is -1"),
        ("--model m --synthetic mmpp --duration-s inf", "the trace lasts inf s"),
    ],
)
def test_bad_options_are_told_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments.split(), "--out", str(tmp_path / "r.jsonl")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_settings_survive_the_way_through_the_command_line(tmp_path: Path) -> None:
    given = ReplaySettings("https://h/v1/", "m", "completions", 5, False, 1.5, 2.5, 3.5, 4.5, api_key=None)
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    assert ReplaySettings.from_arguments(parser.parse_args(given.to_arguments())) == given
    assert given.base_url == "https://h"
    assert json.dumps(given.to_dict())
