"""The benchmark's order and bookkeeping, without an engine."""

import argparse
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nestedfp.vllm import bench
from nestedfp.vllm.bench import engine, grid, remote, report, session

SPEEDS = {
    ("vllm-16bit", None): [100.0, 110.0, 90.0],
    ("nestedfp", "fp16"): [99.0, 98.0, 102.0],
    ("nestedfp", "fp8"): [150.0, 160.0, 155.0],
    ("vllm-fp8", None): [140.0, 140.0, 140.0],
}


class FakeRemote:
    """Stands in for an engine's process; notes what it is asked for in the class's log."""

    log: list[tuple[Any, ...]]
    failing: frozenset[str] = frozenset()

    def __init__(self, task: dict[str, Any], turn: Any, log: Path) -> None:
        self.name = task["engine"]
        self.task = task
        self.counted: dict[Any, int] = {}
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self, seconds: float) -> None:
        if self.name in self.failing:
            raise remote.EngineFailedError(f"{self.name}: its process ended\nout of memory")
        self.facts = {
            "engine": self.name,
            "device": "NVIDIA H100 80GB HBM3",
            "driver": "580.0",
            "versions": {},
            "settings": {},
            "start_s": 60.0,
            "memory": {"weights_bytes": 16, "kv_blocks": self.task["blocks"] or 27000},
        }
        if self.name == "nestedfp":
            self.facts["fused_mlps"] = 32 if self.task["fuse_silu"] else 0

    def call(self, *command: Any, seconds: float = 0.0) -> dict[str, Any]:
        self.log.append((self.name, *command))
        if command[0] != "pass":
            return {}
        _, mode, (_, output_len, _) = command
        if output_len < 64:
            return {}
        count = self.counted[mode] = self.counted.get(mode, -1) + 1
        times = {"ttft_ms": 10.0, "ttft_batches": 8, "tpot_ms": 5.0}
        return {"tokens_per_s": SPEEDS[self.name, mode][count % 3], **times}

    def stop(self) -> None:
        self.log.append((self.name, "stop"))


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    FakeRemote.log = []
    monkeypatch.setattr(session, "Remote", FakeRemote)
    monkeypatch.setattr(FakeRemote, "failing", frozenset())
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser


def run(parser: argparse.ArgumentParser, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = bench.run(parser.parse_args(["--cells", "128/64/8", "--out", str(out), *arguments]))
    return code, json.loads(out.read_text()) if out.exists() else {}


def test_the_file_holds_medians_and_spread_of_all_passes(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    code, data = run(parser, tmp_path / "engine.json")
    assert code == 0
    rows = {row["contender"]: row for row in data["rows"]}
    assert set(rows) == set(grid.CONTENDERS)
    assert rows["vllm-16bit"]["tokens_per_s"] == 100.0
    assert (rows["vllm-16bit"]["tokens_per_s_min"], rows["vllm-16bit"]["tokens_per_s_max"]) == (90.0, 110.0)
    assert rows["nestedfp-fp8"]["passes"] == 3
    assert rows["nestedfp-fp8"]["memory_bytes"] == 16
    assert rows["nestedfp-fp8"]["kv_blocks"] == 4096


@pytest.mark.parametrize(("arguments", "count"), [([], 32), (["--no-fuse-silu"], 0)])
def test_rows_of_nestedfp_say_how_many_mlps_are_fused(
    parser: argparse.ArgumentParser, tmp_path: Path, arguments: list[str], count: int
) -> None:
    _, data = run(parser, tmp_path / "engine.json", *arguments)
    fused = {row["contender"]: row["fused_mlps"] for row in data["rows"] if "fused_mlps" in row}
    assert fused == {"nestedfp-16bit": count, "nestedfp-fp8": count}


def test_contenders_take_turns_there_and_back(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    run(parser, tmp_path / "engine.json")
    passes = [(name, mode) for name, what, *rest in FakeRemote.log if what == "pass" for mode in rest[:1]]
    forth = list(grid.CONTENDERS.values())
    assert passes == [*reversed(forth), *forth, *reversed(forth), *forth]


def test_shared_memory_is_freed_before_another_engine_runs(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    run(parser, tmp_path / "engine.json", "--share-kv")
    holder = None
    for name, what, *_ in FakeRemote.log:
        if what == "park":
            assert holder == name
            holder = None
        elif what in ("pass", "check_flips"):
            assert holder in (None, name)
            holder = name


def test_engines_start_alone_at_the_end_on_the_whole_card(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    _, data = run(parser, tmp_path / "engine.json", "--solo", "vllm-16bit,nestedfp")
    assert [start["engine"] for start in data["solo"]] == ["vllm-16bit", "nestedfp"]
    assert data["solo"][0]["memory"]["kv_blocks"] == 27000


def test_the_table_states_ratios_by_cell() -> None:
    rows = [
        {"input_len": 1, "output_len": 1, "batch": batch, "contender": name, "tokens_per_s": speed}
        for batch, ours, theirs in ((1, 90.0, 100.0), (8, 160.0, 100.0))
        for name, speed in (("nestedfp-16bit", ours), ("vllm-16bit", theirs))
    ]
    assert "nestedfp-16bit / vllm-16bit: geometric mean 1.200, worst 0.900" in report.table(rows)


def test_a_failed_engine_leaves_the_others(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(FakeRemote, "failing", frozenset({"nestedfp"}))
    code, data = run(parser, tmp_path / "engine.json")
    assert code == 0
    assert {row["contender"] for row in data["rows"]} == {"vllm-16bit", "vllm-fp8"}
    assert [(entry["engine"], entry["error"][-13:]) for entry in data["failures"]] == [
        ("nestedfp", "out of memory")
    ]
    monkeypatch.setattr(FakeRemote, "failing", frozenset(grid.ENGINES))
    assert run(parser, tmp_path / "none.json") == (1, {})


def test_nothing_is_measured_after_the_time_limit(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    assert run(parser, tmp_path / "engine.json", "--time-limit", "0") == (1, {})


def test_a_later_run_keeps_whole_cells_of_an_earlier_one(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    out = tmp_path / "engine.json"
    run(parser, out, "--cells", "128/64/8,128/64/1", "--solo", "nestedfp")
    _, data = run(parser, out, "--keep", "--cells", "128/64/8", "--engines", "vllm-16bit")
    found = {(row["batch"], row["contender"]) for row in data["rows"]}
    assert found == {(8, "vllm-16bit"), *((1, name) for name in grid.CONTENDERS)}
    assert [entry["engine"] for entry in data["solo"]] == ["nestedfp"]
    _, data = run(parser, out, "--keep", "--cells", "128/64/1", "--dtype", "bfloat16")
    assert {row["dtype"] for row in data["rows"]} == {"float16", "bfloat16"}
    code, data = run(parser, out, "--keep", "--engines", "", "--solo", "vllm-16bit")
    assert code == 0
    assert data["settings"]["passes"] == 3
    assert len(data["rows"]) == 9
    assert [entry["engine"] for entry in data["solo"]] == ["nestedfp", "vllm-16bit"]
    _, data = run(parser, out, "--cells", "128/64/1")
    assert {(row["dtype"], row["batch"]) for row in data["rows"]} == {("float16", 1)}


def test_figures_of_another_device_are_not_kept() -> None:
    lists: dict[str, Any] = {"rows": [], "engines": [], "solo": [], "profiles": [], "settings": {}}
    solo = [{"engine": "nestedfp"}]
    kept = {**lists, "device": "A", "driver": "1", "versions": {}, "solo": solo}
    new = {**lists, "device": "A", "driver": "1", "versions": {}}
    assert report.merged(kept, new)["solo"] == solo
    for change in ({"device": "B"}, {"driver": "2"}, {"versions": {"torch": "3"}}):
        assert report.merged(kept, {**new, **change})["solo"] == []
    del kept["driver"]
    merged = report.merged(kept, new)
    assert (merged["driver"], merged["solo"]) == ("1", solo), "a file from before drivers were noted"


def test_each_entry_keeps_the_date_of_its_own_run(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "engine.json"
    wanted = ("--keep", "--engines", "vllm-16bit", "--solo", "nestedfp", "--profile")
    monkeypatch.setattr(session, "now", lambda: "2026-01-01T00:00:00+00:00")
    run(parser, out, *wanted, "--cells", "128/64/8,128/64/1")
    data = json.loads(out.read_text())
    del data["rows"][1]["date"]
    out.write_text(json.dumps(data))
    monkeypatch.setattr(session, "now", lambda: "2026-02-02T00:00:00+00:00")
    _, data = run(parser, out, *wanted, "--dtype", "bfloat16")
    assert (data["date"], data["driver"]) == ("2026-02-02T00:00:00+00:00", "580.0")
    months = {"float16": "2026-01", "bfloat16": "2026-02"}
    for name in ("engines", "solo", "profiles"):
        assert {entry["dtype"]: entry["date"][:7] for entry in data[name]} == months
        assert all("driver" not in entry for entry in data[name])
    dates = [(row["dtype"], row["batch"], row.get("date", "")[:7]) for row in data["rows"]]
    assert dates == [("float16", 8, "2026-01"), ("float16", 1, ""), ("bfloat16", 8, "2026-02")]


def test_a_turn_ends_with_its_holder(tmp_path: Path) -> None:
    """A process that is killed while it holds the lock must not stop the others."""
    program = (
        "import sys, pathlib; from nestedfp.vllm.bench.remote import Turn\n"
        "with Turn(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "turn"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with lock.open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.communicate()
    with remote.Turn(lock), lock.open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_a_failed_process_printed_is_part_of_the_error(tmp_path: Path) -> None:
    """A real process, which fails for want of the model's folder."""
    task = {"engine": "vllm-16bit", "model": str(tmp_path / "none"), "dtype": "float16", "device": "cpu"}
    started = remote.Remote({**task, "blocks": 64}, None, tmp_path / "engine.log")
    with pytest.raises(remote.EngineFailedError, match=r"(?s)ended with code 1\n.*none"):
        started.wait_until_ready(120)
    started.stop()


def test_a_warm_up_is_short() -> None:
    assert grid.warm_up_cell((1024, 64, 512)) == (1024, 4, 32)
    assert grid.warm_up_cell((32, 2, 1)) == (32, 2, 1)
    assert len(set(grid.GRID)) == 18


@pytest.mark.parametrize(
    "arguments",
    [
        ["--share-kv", "--tensor-parallel", "2"],
        ["--cells", "128x128"],
        ["--capture-sizes", "few"],
        ["--engines", "sglang"],
        ["--model", "none"],
    ],
)
def test_bad_arguments_are_refused(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.run(parser.parse_args(arguments))


class FakeLLM:
    """Answers a batch with first tokens after the next of `first_s` each, and counts what it was asked."""

    def __init__(self, first_s: list[float]) -> None:
        self._first_s = iter(first_s)
        self.asked: list[int] = []

    def generate(self, prompts: list[Any], params: int, use_tqdm: bool) -> list[Any]:
        self.asked.append(params)
        seconds = next(self._first_s)
        stats = SimpleNamespace(first_token_latency=seconds, first_token_ts=0.0, last_token_ts=0.7)
        return [SimpleNamespace(metrics=stats) for _ in prompts]


@pytest.mark.parametrize(
    ("first_s", "batches", "ttft_ms"),
    [
        ([0.01, *[0.02] * 7], 8, 20.0),
        ([0.1, 0.05, 0.12, 9.0], 3, 100.0),
        ([0.2, 9.0], 1, 200.0),
    ],
)
def test_a_short_ttft_is_read_from_several_batches(
    monkeypatch: pytest.MonkeyPatch, first_s: list[float], batches: int, ttft_ms: float
) -> None:
    monkeypatch.setattr(engine, "greedy", lambda tokens: tokens)
    measured = object.__new__(engine.Engine)
    measured._parking, measured._tokens = None, range(10, 20)
    measured.llm = FakeLLM(first_s)
    found = measured.timed_pass(4, 8, 3)
    assert measured.llm.asked == [8, *[1] * (batches - 1)]
    assert found["ttft_batches"] == batches
    assert found["ttft_ms"] == pytest.approx(ttft_ms)
    assert found["tpot_ms"] == pytest.approx(100.0)
