"""The deployment's own metrics, exported by Ray beside vLLM's; README.md has their table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ray.util.metrics import Counter, Gauge, Histogram

from nestedfp.policies.config import Slo
from nestedfp.policies.protocol import FP8, FP16
from nestedfp.policies.replica import Order
from nestedfp.vllm.status import EngineStatus

_WAIT_BUCKETS_S: Final = [0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0]
_DELAY_BUCKETS_S: Final = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
_LAG_BUCKETS_S: Final = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0]


class ReplicaMetrics:
    """One replica's metrics."""

    def __init__(self, replica: str) -> None:
        self._replica = {"replica": replica}
        self._precision = Gauge("nestedfp_precision", tag_keys=("replica", "precision"))
        self._flips = Counter("nestedfp_flips_total", tag_keys=("replica", "from", "to", "reason"))
        self._engine_flips = Counter("nestedfp_engine_flips_total", tag_keys=("replica",))
        self._cut_steps = Counter("nestedfp_cut_steps_total", tag_keys=("replica",))
        self._flip_seconds = Gauge("nestedfp_flip_seconds", tag_keys=("replica",))
        self._lag = Histogram("nestedfp_target_lag_seconds", boundaries=_LAG_BUCKETS_S, tag_keys=("replica",))
        self._policy_up = Gauge("nestedfp_policy_up", tag_keys=("replica",))
        self._tokens = Counter("nestedfp_tokens_total", tag_keys=("replica", "precision"))
        self._requests = Counter("nestedfp_requests_total", tag_keys=("replica", "class", "served"))
        self._strict_wait = Histogram(
            "nestedfp_strict_wait_seconds", boundaries=_WAIT_BUCKETS_S, tag_keys=("replica",)
        )
        self._delay = Histogram(
            "nestedfp_delay_to_engine_seconds", boundaries=_DELAY_BUCKETS_S, tag_keys=("replica",)
        )
        self._layers = Gauge("nestedfp_layers", tag_keys=("replica", "state"))
        self._fused = Gauge("nestedfp_fused_mlps", tag_keys=("replica",))
        self._headroom = Gauge("nestedfp_slo_headroom", tag_keys=("replica", "signal"))
        self._counted: dict[tuple[object, ...], int] = {}
        self._mode = FP16

    def engine(self, status: EngineStatus) -> None:
        """Take over an engine's status."""
        for precision in {FP16, FP8, status.current, *status.tokens}:
            self._precision.set(float(precision == status.current), self._tags(precision=precision))
        for precision, tokens in status.tokens.items():
            self._count(self._tokens, tokens, precision=precision)
        self._count(self._engine_flips, status.flips)
        self._count(self._cut_steps, status.bounded_steps)
        if status.last_flip_seconds is not None:
            self._flip_seconds.set(status.last_flip_seconds, self._replica)
        for state, layers in status.layers.items():
            self._layers.set(layers, self._tags(state=state))
        self._fused.set(status.fused_mlps, self._replica)

    def order(self, order: Order, lag_s: float) -> None:
        """An order that the engine has taken, `lag_s` after it came."""
        self._lag.observe(lag_s, self._replica)
        if order.mode != self._mode:
            reason = "policy" if order.source == "actor" else "alone"
            self._flips.inc(1, self._tags(**{"from": self._mode, "to": order.mode, "reason": reason}))
        self._mode = order.mode

    def policy_up(self, up: bool) -> None:
        self._policy_up.set(float(up), self._replica)

    def latencies(self, slo: Slo, ttft_s: float | None, tpot_s: float | None) -> None:
        for signal, measured, objective in (("ttft", ttft_s, slo.ttft_s), ("tpot", tpot_s, slo.tpot_s)):
            # Left alone, the gauge would show the last burst for as long as nobody calls.
            used = 0.0 if measured is None else measured / objective
            self._headroom.set(1.0 - used, self._tags(signal=signal))

    def request(
        self,
        *,
        strict: bool,
        status: int,
        tokens: Mapping[str, int] | None,
        waited_s: float,
        delay_s: float | None = None,
    ) -> None:
        """One request that left the replica, `waited_s` of the time at its door, `delay_s` before that."""
        if delay_s is not None:
            self._delay.observe(delay_s, self._replica)
        if strict:
            self._strict_wait.observe(waited_s, self._replica)
        tags = {"class": "fp16" if strict else "any", "served": served_by(status, tokens)}
        self._requests.inc(1, self._tags(**tags))

    def _count(self, counter: Counter, total: int, **tags: str) -> None:
        """Bring a counter to the engine's own count."""
        series = (counter, *tags.values())
        new = total - self._counted.get(series, 0)
        if new > 0:
            counter.inc(new, self._tags(**tags))
        self._counted[series] = total

    def _tags(self, **tags: str) -> dict[str, str]:
        return {**self._replica, **tags}


def served_by(status: int, tokens: Mapping[str, int] | None) -> str:
    """The label `served`: the precision of all tokens, `mixed`, or the HTTP status where tokens are not
    known or the answer was cut off (499).
    """
    used = [precision for precision, count in (tokens or {}).items() if count > 0]
    if status != 200 or not used:
        return str(status)
    return used[0] if len(used) == 1 else "mixed"
