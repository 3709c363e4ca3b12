"""Bounded steps on a real engine: one load, in static modes and in `auto`, beside the simulator's prediction.

    python bench/live_engine.py plan --engine bench/data/engine-<device>.json --out plan.json
    python bench/live_engine.py run plan.json

`plan` runs anywhere: it fits the simulated engine to the measured one, draws a load of bursts around the
capacity in 16 bits, and simulates each contender on it. `run` needs the GPU and vLLM: one engine serves the
load once for each contender, requests arriving by the clock. Both write what `live-<device>.json` holds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nestedfp.loadtests.metrics import distribution_ms

MODEL = "llama-3.1-8b"
CONFIG = Path(__file__).resolve().parent.parent / "deployments" / "configs" / "gpu.yaml"
"""What the engine takes its sizes from: of steps, of the batch, and of what it captures."""
BLOCKS, BLOCK_TOKENS = 16_384, 16
# Of the capacity in 16 bits: between bursts, and in them. Seconds of either.
CALM, BURST, CALM_S, BURST_S, BURSTS = 0.7, 1.7, 8.0, 4.0, 3
DRAIN_S = 60.0


class Contender(NamedTuple):
    """The simulated policy, and the live engine's mode and whether the policy's limits go with it."""

    policy: dict[str, Any]
    mode: str
    bounded: bool


CONTENDERS = {
    "static-fp16": Contender({"controller": "static-fp16"}, "fp16", bounded=False),
    "static-fp8": Contender({"controller": "static-fp8"}, "fp8", bounded=False),
    "static-fp16, cut steps": Contender(
        {"controller": "static-fp16", "cut_steps": True}, "fp16", bounded=True
    ),
    "auto, cut steps": Contender({"controller": "predictive"}, "auto", bounded=True),
}


class Served(NamedTuple):
    """One request's times in seconds from the start, and how many tokens it made."""

    arrival: float
    first: float
    last: float
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("plan", help="draw a load and simulate it")
    command.add_argument("--engine", type=Path, required=True, help="file of `nestedfp bench engine`")
    command.add_argument("--out", type=Path, default=Path("plan.json"))
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(run=plan)
    command = commands.add_parser("run", help="serve it on this machine's GPU")
    command.add_argument("plan", type=Path)
    command.add_argument("--wait-for", type=Path, help="begin once this file exists")
    command.add_argument("--out", type=Path, help="default: bench/data/live-<device>.json")
    command.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


def plan(arguments: argparse.Namespace) -> None:
    """Writes the load, the limits that the policy sends, and what is predicted of each contender."""
    from dataclasses import replace

    from nestedfp.loadtests.synthetic import Lengths, gamma, square_wave
    from nestedfp.policies.config import PolicyConfig
    from nestedfp.policies.controllers.bounds import step_bounds
    from nestedfp.policies.policy import Policy
    from nestedfp.policies.simulation.calibration import measured_engine
    from nestedfp.policies.simulation.capacity import capacity_rps
    from nestedfp.policies.simulation.cluster import simulate
    from nestedfp.policies.simulation.summary import summarize

    settings = measured_engine(json.loads(arguments.engine.read_text()))
    settings = replace(settings, max_sequences=shipped()["max_num_seqs"], kv_tokens=BLOCKS * BLOCK_TOKENS)
    prompt, output = Lengths(500, 0.8, 1500), Lengths(100, 0.8, 400)
    config = PolicyConfig.from_dict({"controller": "predictive"})
    config = replace(config, latency=settings.model)
    static = Policy(PolicyConfig.from_dict({"controller": "static-fp16"}))
    lengths = gamma(prompt, output, rate_rps=20, duration_s=100, seed=arguments.seed)
    capacity = capacity_rps(lengths, static, replicas=1, seed=arguments.seed, settings=settings)
    load = square_wave(
        prompt,
        output,
        calm_rps=CALM * capacity,
        burst_rps=BURST * capacity,
        calm_s=CALM_S,
        burst_s=BURST_S,
        bursts=BURSTS,
        seed=arguments.seed,
    )
    simulated = {}
    for name, contender in CONTENDERS.items():
        chosen = replace(PolicyConfig.from_dict(contender.policy), latency=settings.model)
        outcome = simulate(load, Policy(chosen), replicas=1, seed=arguments.seed, settings=settings)
        summary = summarize(outcome, chosen.slo, settings.label)
        simulated[name] = {
            "attainment": summary["attainment"],
            "fp16_token_share": summary["fp16_token_share"],
            "ttft_ms": summary["ttft_ms"],
            "tpot_ms": summary["tpot_ms"],
        }
        print(name, simulated[name], flush=True)
    columns = (load.arrival_s, load.prompt_tokens, load.output_tokens)
    found = {
        "load": list(load.history),
        "capacity_rps": capacity,
        "simulator": settings.label,
        "slo": {"ttft_s": config.slo.ttft_s, "tpot_s": config.slo.tpot_s},
        "limits": dict(step_bounds(config)),
        "simulated": simulated,
        "requests": [list(request) for request in zip(*(column.tolist() for column in columns), strict=True)],
    }
    arguments.out.write_text(json.dumps(found) + "\n")
    print(f"{arguments.out}: {len(load)} requests, capacity {capacity:.1f} a second")


def run(arguments: argparse.Namespace) -> None:
    """Serves the plan's load in each contender's mode, and writes how it went beside what was predicted."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch

    from nestedfp.vllm.bench.engine import Engine
    from nestedfp.vllm.bench.models import model_folder
    from nestedfp.vllm.bench.process import versions
    from nestedfp.vllm.bench.report import slug

    planned, sizes = json.loads(arguments.plan.read_text()), shipped()
    with tempfile.TemporaryDirectory() as scratch:
        task = {
            "model": str(model_folder(MODEL, Path(scratch))),
            "dtype": "float16",
            "engine": "nestedfp",
            "device": "cuda",
            "blocks": BLOCKS,
            "capture_sizes": sizes["compilation_config"]["cudagraph_capture_sizes"],
            "settings": {name: sizes[name] for name in ("max_num_batched_tokens", "max_num_seqs")},
        }
        engine = Engine(task)
    while arguments.wait_for and not arguments.wait_for.exists():
        time.sleep(1)
    requests = planned.pop("requests")
    # Steps of sizes that are met for the first time compile nothing, but set launches up.
    for mode in ("fp16", "fp8"):
        engine.control("set_target", mode=mode, epoch=0, limits=None)
        serve(engine, requests[: len(requests) // 4])
    rows = []
    for name, contender in CONTENDERS.items():
        limits = planned["limits"] if contender.bounded else None
        engine.control("set_target", mode=contender.mode, epoch=0, limits=limits)
        before = engine.control("status")
        served = serve(engine, requests)
        after = engine.control("status")
        rows.append({"contender": name, **figures(served, len(requests), planned["slo"], before, after)})
        print(json.dumps(rows[-1]), flush=True)
    device = torch.cuda.get_device_name()
    found = {
        "device": device,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "settings": engine.settings,
        **planned,
        "rows": rows,
    }
    out = arguments.out or Path("bench/data") / f"live-{slug(device)}.json"
    out.write_text(json.dumps(found, indent=1) + "\n")


def shipped() -> dict[str, Any]:
    """The engine's arguments in `CONFIG`."""
    arguments: dict[str, Any] = yaml.safe_load(CONFIG.read_text())["applications"][0]["args"]["engine"][
        "arguments"
    ]
    return arguments


def serve(engine: Any, requests: list[list[float]]) -> list[Served]:
    """Sends each request (arrival in seconds, prompt tokens, output tokens) when it is due, and steps the
    engine in between; those that end within a minute of the last arrival."""
    from vllm.sampling_params import RequestOutputKind

    from nestedfp.vllm.bench.engine import greedy

    core = engine.llm.llm_engine
    prompts = [engine.prompts(int(length), 1)[0] for _, length, _ in requests]
    first: dict[str, float] = {}
    made: dict[str, int] = {}
    served: list[Served] = []
    start, sent = time.perf_counter(), 0
    wall = time.time()
    while sent < len(requests) or core.has_unfinished_requests():
        now = time.perf_counter() - start
        if now > requests[-1][0] + DRAIN_S:
            core.abort_request([str(index) for index in range(sent)])
            break
        while sent < len(requests) and requests[sent][0] <= now:
            arrival, _, tokens = requests[sent]
            params = greedy(int(tokens))
            params.output_kind = RequestOutputKind.DELTA
            core.add_request(str(sent), prompts[sent], params, arrival_time=wall + arrival)
            sent += 1
        if not core.has_unfinished_requests():
            time.sleep(max(0.0, requests[sent][0] - now))
            continue
        outputs = core.step()
        now = time.perf_counter() - start
        for output in outputs:
            tokens = len(output.outputs[0].token_ids)
            if tokens:
                first.setdefault(output.request_id, now)
                made[output.request_id] = made.get(output.request_id, 0) + tokens
            if output.finished:
                name = output.request_id
                served.append(Served(requests[int(name)][0], first[name], now, made[name]))
    return served


def figures(
    served: list[Served], sent: int, slo: dict[str, float], before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Attainment of the SLO by all that were sent, and what the engine counted meanwhile."""
    ttft = [each.first - each.arrival for each in served]
    tpot = [(each.last - each.first) / max(1, each.tokens - 1) for each in served]
    late, slow = (
        [each > slo[limit] for each in times] for limit, times in (("ttft_s", ttft), ("tpot_s", tpot))
    )
    missed = {
        "ttft": sum(a and not b for a, b in zip(late, slow, strict=True)),
        "tpot": sum(b and not a for a, b in zip(late, slow, strict=True)),
        "both": sum(a and b for a, b in zip(late, slow, strict=True)),
    }
    tokens = {plan: after["tokens"][plan] - before["tokens"][plan] for plan in after["tokens"]}
    return {
        "requests": {"sent": sent, "served": len(served)},
        "attainment": (len(served) - sum(missed.values())) / sent,
        "missed": missed,
        "fp16_token_share": tokens["fp16"] / max(1, sum(tokens.values())),
        "ttft_ms": distribution_ms(ttft),
        "tpot_ms": distribution_ms(tpot),
        "steps": sum(after["steps"].values()) - sum(before["steps"].values()),
        "bounded_steps": after["bounded_steps"] - before["bounded_steps"],
        "flips": after["flips"] - before["flips"],
        "step_corrections": after["step_corrections"],
    }


if __name__ == "__main__":
    main()
