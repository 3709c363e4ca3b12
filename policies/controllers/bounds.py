"""The bounds of steps that modes are sent with: the SLO, and what a step costs.

What an engine does with them: ``nestedfp.policies.steps``.
"""

from __future__ import annotations

from collections.abc import Mapping

from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.controllers.base import Controller, Memory, Wish
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.roofline import latency_model
from nestedfp.policies.snapshot import Snapshot
from nestedfp.policies.steps import StepBounds, StepTerms, to_limits


def step_bounds(config: PolicyConfig) -> Mapping[str, float]:
    """Bounds and terms as the limits of a mode.

    They follow from the settings alone and so never change: the engine corrects the terms by its own steps.
    """
    costs = (config.latency or latency_model()).costs
    terms = {
        mode: StepTerms(*(float(getattr(costs[mode], term)) for term in StepTerms._fields))
        for mode in (FP16, FP8)
    }
    return to_limits(bounds_of(config), terms)


def bounds_of(config: PolicyConfig) -> StepBounds:
    """The bounds that ``config`` asks for."""
    slo, prediction = config.slo, config.prediction
    return StepBounds(
        pace_s=prediction.pace * slo.tpot_s,
        tpot_s=slo.tpot_s,
        ttft_s=prediction.first_token * slo.ttft_s,
        late_s=slo.ttft_s,
        least_tokens=float(prediction.least_tokens),
        light_ttft_s=prediction.light_first_token * slo.ttft_s,
        given_up_s=prediction.give_up * slo.ttft_s,
        light_s=prediction.light_batch * slo.tpot_s,
        heavy_s=prediction.heavy_batch * slo.tpot_s,
    )


class BoundedController(Controller):
    """A controller whose modes are all sent with these bounds, beside the limits that it sends itself."""

    def __init__(self, controller: Controller, bounds: Mapping[str, float]) -> None:
        self._controller = controller
        self._bounds = bounds
        self._stays: dict[str, Wish] = {}

    @property
    def limits(self) -> Mapping[str, float]:
        return self._bounds

    def start(self) -> Memory:
        return self._controller.start()

    def wishes(
        self, snapshot: Snapshot, modes: Mapping[str, str], memory: Memory, now: float
    ) -> tuple[dict[str, Wish], Memory]:
        wishes, after = self._controller.wishes(snapshot, modes, memory, now)
        ids = [view.report.replica_id for view in snapshot.replicas]
        bounded = {key: self._stay(modes[key]) for key in ids}
        for key, wish in wishes.items():
            limits = {**self._bounds, **wish.limits} if wish.limits else self._bounds
            bounded[key] = wish._replace(limits=limits)
        return bounded, after

    def _stay(self, mode: str) -> Wish:
        """One object for all that stay in a mode, by which their assignments are shared."""
        found = self._stays.get(mode)
        if found is None:
            found = self._stays[mode] = Wish(mode, "as ordered", limits=self._bounds)
        return found
