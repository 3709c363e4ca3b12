"""Which actor is meant: by its name, and among several of one application by who follows it."""

from __future__ import annotations

from typing import Any

import pytest

from nestedfp.deployments import policy_search
from nestedfp.deployments.policy_actor import actor_name, application_of
from nestedfp.deployments.policy_search import NoPolicy, find, standing
from nestedfp.policies.checks import InvalidField
from nestedfp.policies.config import PolicyConfig


@pytest.mark.parametrize("application", ["chat", "a b", "team::chat"])
def test_the_application_can_be_read_from_the_name(application: str) -> None:
    assert application_of(actor_name(application, PolicyConfig())) == application


@pytest.mark.parametrize(
    "name", ["", "SERVE_CONTROLLER_ACTOR", "nestedfp-policy", "nestedfp-policy::x", "x::chat::1"]
)
def test_other_names_are_no_policy_actors(name: str) -> None:
    assert application_of(name) is None


def status(*replicas: tuple[float, float, bool]) -> dict[str, Any]:
    """Of replicas given as the time of their boot, how long ago they were heard, and whether in time."""
    entries = [
        {"report": {"booted_at": booted_at}, "heard_s_ago": heard_s_ago, "leased": leased}
        for booted_at, heard_s_ago, leased in replicas
    ]
    return {"replicas": dict(enumerate(entries))}


@pytest.mark.parametrize(
    ("current", "other"),
    [
        (status((20.0, 0.3, True)), status((10.0, 0.1, True), (11.0, 0.1, True))),
        (status((10.0, 0.3, True)), status((20.0, 9.0, False))),
        (status((10.0, 9.0, False)), status((20.0, 19.0, False))),
        (status((10.0, 50.0, False)), status()),
    ],
    ids=["newest", "live", "heard last", "heard at all"],
)
def test_the_actor_that_counts(current: dict[str, Any], other: dict[str, Any]) -> None:
    assert standing(current) > standing(other)


def test_without_an_actor_or_with_several_applications_the_remedy_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed = ["SERVE_CONTROLLER_ACTOR"]
    monkeypatch.setattr(policy_search, "list_named_actors", lambda: listed)
    with pytest.raises(NoPolicy, match="no policy actor; deploy an application"):
        find(None)
    listed += [actor_name(name, PolicyConfig()) for name in ("b", "a", "b")]
    with pytest.raises(NoPolicy, match=r"--app: not given, and this Ray has several; choose a or b"):
        find(None)
    with pytest.raises(InvalidField, match=r"--app: got 'c'; choose one of a, b"):
        find("c")
