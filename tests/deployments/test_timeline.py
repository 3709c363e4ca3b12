"""The timeline of a replay, from statuses made by hand."""

import json
import time
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from nestedfp.deployments import timeline
from nestedfp.loadtests.records import read_timeline


def report(mode: str = "fp16", **facts: int) -> dict[str, Any]:
    return {"mode": mode, "running": 0, "waiting": 0, "tokens_fp16": 0, "tokens_fp8": 0, **facts}


def status(*log: dict[str, Any], **replicas: dict[str, Any]) -> dict[str, Any]:
    return {"replicas": {name: {"report": each} for name, each in replicas.items()}, "log": list(log)}


def test_tokens_are_counted_from_one_status_to_the_next() -> None:
    before = status(a=report(tokens_fp16=3, tokens_fp8=5), gone=report(tokens_fp16=100))
    after = status(
        a=report(tokens_fp16=10, tokens_fp8=5),
        new=report(tokens_fp16=4, tokens_fp8=2),
        silent={**report(), "tokens_fp16": None, "tokens_fp8": None},
    )
    assert timeline.tokens_between(before, after) == {"fp16": 11, "fp8": 2}


def test_quiet_is_every_replica_idle_and_in_16_bits() -> None:
    assert timeline.is_quiet(status(a=report(), b=report()), 2)
    assert not timeline.is_quiet(status(a=report()), 2)
    assert not timeline.is_quiet(status(), 1)
    assert not timeline.is_quiet(status(a=report(), b=report("fp8")), 2)
    assert timeline.is_quiet(status(a=report("fp8")), 1, "fp8")
    assert not timeline.is_quiet(status(a=report(running=1)), 1)
    assert not timeline.is_quiet(status(a=report(waiting=1)), 1)


def flip(at: float, mode: str) -> dict[str, Any]:
    return {"at": at, "replica_id": "a", "from": "fp16", "to": mode, "reason": "waiting 3 over 2"}


def test_flips_of_this_replay_are_written_once_and_a_failing_status_leaves_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    now = time.time()
    log = [flip(now - 60, "fp8"), flip(now + 1, "fp8")]
    answers = iter([status(*log, a=report()), RayError("gone"), status(*log, a=report("fp8", running=2))])
    last = status(*log, flip(now + 2, "fp16"), a=report())

    def next_status() -> dict[str, Any]:
        answer = next(answers, last)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with timeline.Recorder(path, next_status) as recorder:
        recorder.start(time.monotonic(), now)
        time.sleep(0.9)

    lines = [json.loads(line) for line in path.read_text().splitlines()]
    flips = [line for line in lines if line["kind"] == "flip"]
    assert [(round(line["t"], 3), line["to"], line["replica"]) for line in flips] == [
        (1.0, "fp8", "a"),
        (2.0, "fp16", "a"),
    ]
    assert all(line["reason"] == "waiting 3 over 2" for line in flips)
    samples = [line["mode"] for line in lines if line["kind"] == "sample"]
    assert samples[:2] == ["fp16", "fp8"]
    assert read_timeline(path)


def test_a_recorder_that_never_started_closes(tmp_path: Path) -> None:
    with timeline.Recorder(tmp_path / "timeline.jsonl", status):
        pass
    assert not (tmp_path / "timeline.jsonl").exists()
