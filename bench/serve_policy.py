"""The policy through real Ray Serve: how fast orders arrive, and one minute of a trace. Writes
bench/data/serve-policy.json.

    python bench/serve_policy.py delivery             200 orders to 8 simulated replicas
    python bench/serve_policy.py delivery --config deployments/configs/cpu-demo.yaml --decisions 100 --load 2
                                                      the same to real replicas, each with streams running
    python bench/serve_policy.py minute --trace FILE  the first minute of a trace on one simulated replica

`minute` keeps so many of the trace's requests that static FP16 violates 19 of its 60 seconds, and then runs
each policy on the same requests, three times (`--runs`) with other noise on the step times. A run takes a
minute and a half, all of them a quarter of an hour, and each further scale that is tried five minutes more.
The scale is found with the engine alone and confirmed live, by the median. Times are those of the engine's
clock, which no delay of this machine changes; it can only be late with requests and orders. So static runs
are repeated on the engine alone with the arrivals that they had, and both must violate as many seconds; and a
run whose requests were late does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from random import random
from statistics import median
from typing import Any, Final

import httpx
import yaml
from policy_minute import (
    SECONDS,
    TPOT_LIMIT_S,
    Minute,
    Served,
    alone,
    as_arrived,
    counts,
    first_minute,
    scale_for,
    summary,
    thinned,
    violating_seconds,
)

from nestedfp.deployments.cluster import RunningApp, running
from nestedfp.deployments.config import SIMULATED, DeploymentSettings
from nestedfp.deployments.interrupt import Interrupted, raise_on_signals
from nestedfp.deployments.serve_file import ServeFile
from nestedfp.deployments.signals import percentile
from nestedfp.loadtests.readers import read_trace
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import LABEL

ROOT: Final = Path(__file__).resolve().parent.parent
DATA: Final = ROOT / "bench" / "data" / "serve-policy.json"
CONFIG: Final = Path(str(files("nestedfp.deployments"))) / "configs" / "simulated.yaml"
TOLERANCE: Final = 1
"""Violating seconds that static FP16 may be off by."""
SIMULATED_RUNS: Final = 9
MOST_LATE_S: Final = 0.15
"""A run is repeated where the 99th percentile of requests came later than this: it was another minute."""
ATTEMPTS: Final = 3
"""After so many a run counts, however late: the machine is not going to be quieter."""
STATIC: Final = {"static-fp16": FP16, "static-fp8": FP8}
POLICIES: Final = (*STATIC, "static-fp16:cut_steps=true", "predictive")
_ORDER_TIMEOUT_S: Final = 10.0
_ANSWER_TIMEOUT_S: Final = 300.0
_REGISTER_S: Final = 30.0


@contextmanager
def application(file: ServeFile) -> Iterator[RunningApp]:
    with (
        tempfile.TemporaryDirectory(prefix="nfp-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        running(file, say=_say, temp_dir=Path(folder)) as app,
    ):
        wanted = file.settings.replicas_at_start
        deadline_s = time.monotonic() + _REGISTER_S
        while len(app.policy_status()["replicas"]) < wanted:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"fewer than {wanted} replicas have registered after {_REGISTER_S:g} s")
            time.sleep(0.2)
        yield app


def under(file: ServeFile, policy: str, seed: int) -> ServeFile:
    """One replica under `CONTROLLER` or `CONTROLLER:NAME=VALUE,...`, settings of the policy's: `NAME` or
    `BLOCK.NAME`.

    `seed` is that of the noise on its step times.
    """
    controller, _, changes = policy.partition(":")
    settings = file.settings.to_dict()
    settings["replicas"]["count"] = 1
    settings["engine"]["arguments"] = {**settings["engine"]["arguments"], "seed": seed}
    settings["policy"]["controller"] = controller
    for change in filter(None, changes.split(",")):
        name, _, value = change.partition("=")
        block, _, inner = name.rpartition(".")
        target = settings["policy"][block] if block else settings["policy"]
        target |= {inner: yaml.safe_load(value)}
    return dataclasses.replace(file, settings=DeploymentSettings.from_dict(settings))


async def play(url: str, model: str, minute: Minute) -> tuple[list[Served], dict[str, Any]]:
    """Send each request at its time; what was served, on the minute's clock, and the client's view."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(timeout=_ANSWER_TIMEOUT_S, limits=limits) as client:
        started_s = time.monotonic() + 1.0
        lags: list[float] = []

        async def one(arrival_s: float, prompt: int, output: int) -> tuple[dict[str, Any], float] | None:
            await asyncio.sleep(max(0.0, started_s + arrival_s - time.monotonic()))
            sent_s = time.monotonic()
            lags.append(sent_s - started_s - arrival_s)
            body = {"model": model, "prompt": [1] * prompt, "max_tokens": output, "token_times": True}
            response = await client.post(f"{url}/completions", json=body)
            if response.status_code != 200:
                _say(f"HTTP status {response.status_code}: {response.text[:200]}")
                return None
            usage = response.json()["usage"]
            return {**usage["simulated"], **usage["nestedfp"]}, time.monotonic() - sent_s

        answers = await asyncio.gather(*(one(*request) for request in zip(*minute, strict=True)))
    good = [
        (arrival_s, *answer)
        for arrival_s, answer in zip(minute.arrival_s, answers, strict=True)
        if answer is not None
    ]
    # The engine's clock starts somewhere else: the request that was held up least on its way sets it.
    origin_s = min((fact["queued_s"] - arrival_s for arrival_s, fact, _ in good), default=0.0)
    served = [
        Served(fact["queued_s"] - origin_s, [at - origin_s for at in fact["token_s"]], fact["token_modes"])
        for _, fact, _ in good
    ]
    late = [request.arrival_s - arrival_s for request, (arrival_s, *_) in zip(served, good, strict=True)]
    added = [whole_s - (fact["token_s"][-1] - fact["queued_s"]) for _, fact, whole_s in good]
    executed = {mode: sum(fact[mode] for _, fact, _ in good) for mode in (FP16, FP8)}
    view = {
        "tokens_in_fp16": executed[FP16] / max(1, sum(executed.values())),
        "failed": len(answers) - len(good),
        "client_lag_p99_s": percentile(lags, 99.0),
        "arrival_lag_p50_s": percentile(late, 50.0),
        "arrival_lag_p99_s": percentile(late, 99.0),
        "added_by_serve_p50_s": percentile(added, 50.0),
        "added_by_serve_p99_s": percentile(added, 99.0),
    }
    return served, view


def live(file: ServeFile, minute: Minute, policy: str, seed: int) -> dict[str, Any]:
    """The minute through Ray Serve under one policy (see :func:`under`)."""
    file = under(file, policy, seed)
    with application(file) as app:
        served, view = asyncio.run(play(app.url, app.model, minute))
        changes = app.policy_status()["changes"]
    result = {"policy": policy, "seed": seed, **summary(served), "mode_changes": changes, **view}
    if policy in STATIC and not view["failed"]:
        repeated = alone(as_arrived(minute, served), file.settings, STATIC[policy], seed)
        result["violating_seconds_alone"] = violating_seconds(repeated)
    _say(json.dumps(result))
    return result


class Minutes:
    """Runs minutes live, one after the other, and says how far they are."""

    def __init__(self, file: ServeFile, whole: Minute, each: int) -> None:
        self._file, self._whole, self._each = file, whole, each
        self._started_s = time.monotonic()
        self.runs: list[dict[str, Any]] = []

    def violations(self, policy: str, scale: float, left: int) -> float:
        """Violating seconds in the median of several runs, after which `left` more are to come."""
        minute = thinned(self._whole, scale)
        for seed in range(self._each):
            for attempt in range(1, ATTEMPTS + 1):
                self._tell(f"{policy}, seed {seed}, scale {scale:.4f}", self._each - seed + left)
                run = live(self._file, minute, policy, seed)
                late_s = run["arrival_lag_p99_s"] or 0.0
                counted = late_s <= MOST_LATE_S or attempt == ATTEMPTS
                self.runs.append({"scale": scale, "counted": counted, **run})
                if counted:
                    break
                _say(f"requests were up to {late_s:.2f} s late, as this machine is busy: once more")
        violations = counts(self.runs, scale)[policy]["violating_seconds"]
        _say(f"{policy} at {scale:.4f} violates {violations['runs']}, median {violations['median']:g}")
        return float(violations["median"])

    def _tell(self, what: str, left: int) -> None:
        done, spent_min = len(self.runs), (time.monotonic() - self._started_s) / 60.0
        _say(f"run {done + 1} of {done + left} or more, {spent_min:.0f} min so far: {what}")


def run_minute(args: argparse.Namespace) -> dict[str, Any]:
    file = ServeFile.load(args.config)
    whole = first_minute(read_trace(args.trace))
    others = [policy for policy in args.policies if policy != "static-fp16"]
    minutes = Minutes(file, whole, args.runs)

    def simulated(scale: float) -> float:
        minute = thinned(whole, scale)
        count = median(
            violating_seconds(alone(minute, file.settings, FP16, seed)) for seed in range(SIMULATED_RUNS)
        )
        _say(f"the engine alone at scale {scale:.4f}: {count} violating seconds")
        return count

    def measured(scale: float) -> float:
        return minutes.violations("static-fp16", scale, args.runs * len(others))

    first = args.scale or scale_for(simulated, first=1.0, stride=2.0, within=0.0, tries=12)
    scale = scale_for(
        measured, first=first, stride=1.03, within=TOLERANCE, tries=1 if args.scale else args.scales
    )
    for number, policy in enumerate(others, start=1):
        minutes.violations(policy, scale, args.runs * (len(others) - number))
    counted = counts(minutes.runs, scale)
    _say(f"scale {scale:.4f}: {json.dumps(counted)}")
    return {
        "engine": LABEL,
        "trace": args.trace.name,
        "seconds": SECONDS,
        "tpot_limit_s": TPOT_LIMIT_S,
        "scale": scale,
        "requests": len(thinned(whole, scale).arrival_s),
        "policy": _plain_policy(file),
        "counts": counted,
        "runs": minutes.runs,
    }


def run_delivery(args: argparse.Namespace) -> dict[str, Any]:
    """Orders to all replicas, one after the other: from the decision until the last engine has taken it."""
    file = ServeFile.load(args.config)
    count = file.settings.replicas_at_start
    stop = threading.Event()
    with application(file) as app:
        streams = [
            threading.Thread(target=_stream, args=(app.url, app.model, stop))
            for _ in range(args.load * count)
        ]
        for stream in streams:
            stream.start()
        try:
            time.sleep(2.0)
            each = [_order(app, (FP8, FP16)[number % 2], count) for number in range(args.decisions)]
        finally:
            stop.set()
            for stream in streams:
                stream.join()
    last_s = [max(delays) for delays in each]
    every_s = [delay for delays in each for delay in delays]
    result = {
        "engine": LABEL
        if file.settings.engine.device == SIMULATED
        else file.settings.engine.served_model_name,
        "device": file.settings.engine.device,
        "replicas": count,
        "streams_per_replica": args.load,
        "decisions": len(each),
        "to_last_replica_ms": _spread(last_s),
        "to_each_replica_ms": _spread(every_s),
    }
    _say(json.dumps(result))
    return result


def _order(app: RunningApp, mode: str, replicas: int) -> list[float]:
    """Pin `mode` and wait until every engine has it: the delay of each, in seconds."""
    app.pin(mode, 3600.0)
    deadline_s = time.monotonic() + _ORDER_TIMEOUT_S
    while time.monotonic() < deadline_s:
        # The actor measures; asking it while it delivers would only be in its way. Not in step with reports.
        time.sleep(0.2 + 0.1 * random())
        entries = [entry for entry in app.policy_status()["replicas"].values() if entry["leased"]]
        delays = [entry["delivery_s"] for entry in entries if entry["target"]["mode"] == mode]
        if len(delays) == replicas and None not in delays:
            return delays
    raise TimeoutError(f"not every replica had taken {mode} after {_ORDER_TIMEOUT_S:g} s")


def _stream(url: str, model: str, stop: threading.Event) -> None:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 256, "stream": True}
    with httpx.Client(timeout=_ANSWER_TIMEOUT_S) as client:
        while not stop.is_set():
            with client.stream("POST", f"{url}/completions", json=body) as response:
                for _ in response.iter_lines():
                    if stop.is_set():
                        break


def _spread(seconds: list[float]) -> dict[str, float | None]:
    names = {"p50": 50.0, "p95": 95.0, "max": 100.0}
    return {name: round(1e3 * (percentile(seconds, at) or 0.0), 2) for name, at in names.items()}


def _plain_policy(file: ServeFile) -> dict[str, Any]:
    policy = file.settings.policy.to_dict()
    return {
        name: policy[name] for name in ("slo", "prediction", "min_dwell_s", "calm_s", "max_flips_per_minute")
    }


def _machine() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "ray": version("ray"),
        "python": platform.python_version(),
    }


def _keep(path: Path, section: str, result: Mapping[str, Any]) -> None:
    """Replace one section of the results."""
    data = json.loads(path.read_text()) if path.exists() else {}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    data[section] = {"date": date, "machine": _machine(), **result}
    path.write_text(json.dumps(data, indent=1) + "\n")


def _say(message: str) -> None:
    print(message, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=DATA)
    parts = parser.add_subparsers(dest="part", required=True)
    delivery = parts.add_parser("delivery", help="from a decision to the engines")
    delivery.add_argument("--config", type=Path, default=CONFIG)
    delivery.add_argument("--decisions", type=int, default=200)
    delivery.add_argument("--load", type=int, default=0, help="streams running at each replica")
    minute = parts.add_parser("minute", help="one minute of a trace under each controller")
    minute.add_argument("--config", type=Path, default=CONFIG)
    minute.add_argument("--trace", type=Path, required=True, help="an Azure CSV file")
    minute.add_argument("--scale", type=float, help="share of the requests to keep (default: found)")
    minute.add_argument("--runs", type=int, default=3, help="of each policy; the median counts")
    minute.add_argument("--scales", type=int, default=6, help="at most so many are tried live")
    minute.add_argument(
        "--policies", nargs="+", default=list(POLICIES), help="CONTROLLER[:[BLOCK.]NAME=VALUE,...]"
    )
    args = parser.parse_args()
    raise_on_signals()
    try:
        if args.part == "minute":
            _keep(args.out, "minute", run_minute(args))
        else:
            result = run_delivery(args)
            load = f"-load-{args.load}" if args.load else ""
            _keep(args.out, f"delivery-{result['device']}{load}", result)
    except Interrupted:
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
