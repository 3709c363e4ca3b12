"""Messages: what is refused, what is kept with a fault, and that nothing changes on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestedfp.policies.checks import InvalidField
from nestedfp.policies.protocol import ReplicaReport, Target

SIGNALS = (
    "running",
    "waiting",
    "waiting_prompt_tokens",
    "oldest_waiting_s",
    "kv_usage",
    "arrivals_per_s",
    "tokens_fp16",
    "tokens_fp8",
    "flips",
    "age_s",
)


def test_report_survives_json(report: Callable[..., ReplicaReport]) -> None:
    sent = report(running=3, waiting=2, ttft_p90_s=0.4, kv_usage=1.0, context_tokens=77, strict_waiting=1)
    assert ReplicaReport.from_dict(json.loads(json.dumps(sent.to_dict()))) == sent


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1, "7", None, True, []])
def test_an_unusable_signal_is_a_fault_and_not_an_error(
    report: Callable[..., ReplicaReport], signal: str, bad: object
) -> None:
    received = ReplicaReport.from_dict({**report().to_dict(), signal: bad})
    assert received.faults == (signal,)
    assert getattr(received, signal) == 0
    assert received.replica_id == "a"


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_missing_signal_is_a_fault(report: Callable[..., ReplicaReport], signal: str) -> None:
    message = report().to_dict()
    del message[signal]
    assert ReplicaReport.from_dict(message).faults == (signal,)


def test_percentiles_may_be_unknown_but_not_absurd(report: Callable[..., ReplicaReport]) -> None:
    assert ReplicaReport.from_dict({**report().to_dict(), "ttft_p90_s": None}).faults == ()
    assert ReplicaReport.from_dict({**report().to_dict(), "ttft_p90_s": -0.1}).faults == ("ttft_p90_s",)
    assert ReplicaReport.from_dict({**report().to_dict(), "kv_usage": 1.2}).faults == ("kv_usage",)
    assert ReplicaReport.from_dict({**report().to_dict(), "age_s": 10**400}).faults == ("age_s",)


def test_optional_signals_may_be_left_out_and_unknown_ones_are_ignored(
    report: Callable[..., ReplicaReport],
) -> None:
    message = report().to_dict()
    del message["context_tokens"], message["strict_running"]
    assert ReplicaReport.from_dict({**message, "from_the_future": 1}).faults == ()


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("replica_id", ""),
        ("replica_id", 7),
        ("boot_id", None),
        ("boot_id", "x" * 300),
        ("sequence", 0),
        ("sequence", 1.5),
        ("epoch", -1),
        ("mode", "FP 16"),
        ("mode", None),
    ],
)
def test_a_report_without_a_sender_is_refused(
    report: Callable[..., ReplicaReport], field: str, bad: object
) -> None:
    with pytest.raises(InvalidField) as caught:
        ReplicaReport.from_dict({**report().to_dict(), field: bad})
    assert caught.value.field == field
    assert repr(bad) in str(caught.value)
    assert caught.value.remedy in str(caught.value)


def test_the_constructor_refuses_unusable_signals(report: Callable[..., ReplicaReport]) -> None:
    with pytest.raises(InvalidField, match="kv_usage"):
        report(kv_usage=math.nan)


@given(
    st.dictionaries(
        st.sampled_from([*SIGNALS, "replica_id", "boot_id", "sequence", "mode", "epoch", "ttft_p90_s"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())),
    )
)
@settings(deadline=None)
def test_no_message_makes_from_dict_fail_in_another_way(message: dict[str, Any]) -> None:
    try:
        received = ReplicaReport.from_dict(message)
    except InvalidField:
        return
    assert ReplicaReport.from_dict(received.to_dict()).faults == ()


def test_target_survives_json() -> None:
    sent = Target(epoch=4, mode="mlp-fp8", lease_s=5.0, reason="r", limits={"x": 1.0}, owner="o", sequence=2)
    assert Target.from_dict(json.loads(json.dumps(sent.to_dict()))) == sent


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("epoch", -1),
        ("epoch", None),
        ("mode", ""),
        ("lease_s", 0.0),
        ("lease_s", math.nan),
        ("reason", None),
        ("limits", {"waiting": -1}),
        ("limits", [1]),
        ("sequence", "1"),
    ],
)
def test_a_malformed_target_is_refused(field: str, bad: object) -> None:
    message = Target(epoch=1, mode="fp8", lease_s=5.0, reason="r").to_dict()
    with pytest.raises(InvalidField) as caught:
        Target.from_dict({**message, field: bad})
    assert caught.value.field.startswith(field)
