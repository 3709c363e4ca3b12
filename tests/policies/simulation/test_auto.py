"""Bounds of steps in the simulator: the same steps as vLLM's scheduler takes, and what bounds do."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nestedfp.policies.config import Slo
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.simulation import engine
from nestedfp.policies.simulation.cluster import Cluster
from nestedfp.policies.simulation.state import Columns, EngineSettings, costs_of
from nestedfp.policies.simulation.summary import tpot_s, ttft_s
from nestedfp.policies.steps import StepBounds, StepTerms
from nestedfp.vllm.progress import Progress
from nestedfp.vllm.selection import PlanSelection
from nestedfp.vllm.settings import Settings

BOUNDS = StepBounds(
    pace_s=0.02,
    tpot_s=0.033,
    ttft_s=0.2,
    late_s=0.4,
    least_tokens=256.0,
    light_ttft_s=0.3,
    given_up_s=0.6,
    light_s=0.003,
    heavy_s=0.006,
)
FREE = StepBounds(*(math.inf,) * len(StepBounds._fields))
TERMS = {
    mode: StepTerms(*(getattr(costs, term) for term in StepTerms._fields))
    for mode, costs in latency_model().costs.items()
}
SETTINGS = EngineSettings(noise=0.0)


def cluster(
    rate: float, mode: str = "auto", bounds: StepBounds | None = None, strict: float = 0.0
) -> Cluster:
    random = np.random.default_rng(4)
    count = 400
    load = Columns(
        np.cumsum(random.exponential(1.0 / rate, count)),
        random.integers(50, 2500, count).astype(np.int32),
        random.integers(2, 120, count).astype(np.int32),
        random.random(count) < strict,
    )
    made = Cluster(load, 1, SETTINGS, seed=0, slo=Slo())
    made.order("replica-0", mode, None if bounds is None else bounds._asdict())
    return made


def served(made: Cluster) -> Cluster:
    while made.busy:
        made.tick(made.now + 1.0)
    return made


def tokens(made: Cluster) -> tuple[int, int]:
    requests = served(made).requests
    return int(requests["fp16"].sum()), int(requests["fp8"].sum())


def as_in_vllm(requests: Any, r: int, *, generated: int | None = None) -> SimpleNamespace:
    """Request `r` with the attributes that vLLM's scheduler knows it by."""
    request = requests[r]
    made = int(request["generated"]) if generated is None else generated
    return SimpleNamespace(
        request_id=str(r),
        arrival_time=float(request["arrival_s"]),
        num_prompt_tokens=int(request["prompt"]),
        num_computed_tokens=int(request["computed"]),
        num_output_tokens=made,
        num_tokens=int(request["prompt"]) + made,
    )


@pytest.mark.parametrize("mode", ["auto", "fp16", "fp8"])
@pytest.mark.parametrize("rate", [4.0, 12.0, 20.0, 40.0])
def test_the_simulator_bounds_its_steps_as_the_scheduler_does(rate: float, mode: str) -> None:
    """At many moments of a run both are asked what the next step may be."""
    made = cluster(rate, mode, BOUNDS)
    selection = PlanSelection(Settings())
    terms = {f"{name}_{term}": value for name, its in TERMS.items() for term, value in its._asdict().items()}
    selection.set_target(mode, 1, limits={**BOUNDS._asdict(), **terms})
    answers = set()
    for tick in range(1, 400):
        made.tick(0.05 * tick)
        requests, replica = made.requests, made.engines.replicas[0]
        if np.isinf(replica["step_end_s"]):
            continue
        running = made.engines.slots[0, : int(replica["running"])].tolist()
        waiting, r = [], int(replica["head"])
        while r >= 0:
            waiting.append(as_in_vllm(requests, r))
            r = int(requests["next"][r])
        facts = {"ahead_s": 0.0, "most_tokens": 2048, "crowded": False}
        progress = Progress()
        for r in running:
            if requests["generated"][r]:
                # The scheduler sees each request with its first token, as soon as it has it.
                first = as_in_vllm(requests, r, generated=1)
                at = float(requests["first_s"][r])
                progress.work([first], [], BOUNDS, TERMS["fp8"], now=at, wall=at, **facts)
        batch = [as_in_vllm(requests, r) for r in running]
        work = progress.work(batch, waiting, BOUNDS, TERMS["fp8"], now=made.now, wall=made.now, **facts)
        bounded = selection.bound(work, TERMS.__getitem__, ())
        assert bounded is not None
        number, most = engine._bounded(0, made.now, requests, made.engines, costs_of(SETTINGS))
        assert (("fp16", "fp8")[number], most) == (bounded.plan, bounded.tokens)
        answers.add((number, most < 2048))
    if mode == "auto" or rate > 4.0:
        assert len(answers) >= 2


def test_without_bounds_auto_is_16_bits_and_tighter_ones_mean_more_fp8() -> None:
    assert tokens(cluster(12.0))[1] == 0
    assert tokens(cluster(12.0, "auto", FREE))[1] == 0
    shares: list[float] = []
    for pace in (0.033, 0.02, 0.008):
        fp16, fp8 = tokens(cluster(20.0, "auto", BOUNDS._replace(pace_s=pace)))
        shares.append(fp8 / (fp16 + fp8))
    assert 0.0 < shares[0] < shares[1] < shares[2] < 1.0
    fp8_always = FREE._replace(pace_s=0.0, tpot_s=1e9, ttft_s=0.0, heavy_s=0.0)
    assert tokens(cluster(12.0, "auto", fp8_always))[0] == 0


def test_cut_steps_keep_short_answers_within_the_slo() -> None:
    """A full step of 2,048 tokens alone takes 16 bits 51 ms, of which no answer of two tokens is in time."""
    whole, cut = served(cluster(10.0, "fp16")), served(cluster(10.0, "fp16", BOUNDS))
    missed = [float((tpot_s(made.requests) > 0.033).mean()) for made in (whole, cut)]
    assert missed[1] < 0.5 * missed[0]
    assert np.median(ttft_s(cut.requests)) < 2.0 * np.median(ttft_s(whole.requests))
    # No token is lost, and none has another precision.
    assert tokens(cut) == tokens(whole)


def test_what_is_late_is_served_in_16_bits_and_what_is_not_is_not() -> None:
    """A burst far beyond FP8: where no prompt can be in time, 16 bits take nothing from anyone."""
    requests = served(cluster(80.0, "auto", BOUNDS)).requests
    met = requests["first_s"] - requests["arrival_s"] <= BOUNDS.late_s
    assert met.any()
    assert requests["fp16"][~met].sum() > 10 * requests["fp16"][met].sum()


def test_a_strict_request_has_no_token_in_fp8_within_auto() -> None:
    made = cluster(12.0, "auto", BOUNDS._replace(ttft_s=0.0, light_ttft_s=0.0), strict=0.1)
    _, fp8 = tokens(made)
    assert fp8 > 0
    assert made.requests["fp8"][made.requests["strict"]].sum() == 0
