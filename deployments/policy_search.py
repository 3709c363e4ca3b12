"""Finds the policy actor of an application among the named actors of a Ray; creates none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from nestedfp.deployments.policy_actor import NAMESPACE, application_of
from nestedfp.deployments.policy_calls import PolicyCalls
from nestedfp.policies import checks


class NoPolicy(RuntimeError):
    """There is no policy actor to ask, or no telling which; the message says what to do."""


class Found(NamedTuple):
    """An application's policy actor, with the status by which it was chosen."""

    app_name: str
    name: str
    calls: PolicyCalls
    status: Mapping[str, Any]
    others: Mapping[str, int]
    """The application's other actors that answer, by name, each with the number of its live replicas."""


def find(app_name: str | None) -> Found:
    """The policy actor of the application, which is the only one where `app_name` is None.

    After a change of settings or code an application has two for a while: the one that counts is that of the
    replica that started last. Needs a connection to Ray in the actors' namespace. Raises
    :class:`NoPolicy`, :class:`InvalidField` for an unknown application, and :class:`RayError` where no actor
    of the application answers.
    """
    app_name, names = _choose(app_name, list_named_actors())
    answers: dict[str, tuple[PolicyCalls, dict[str, Any]]] = {}
    failure: RayError | None = None
    for name in names:
        try:
            calls = PolicyCalls(ray.get_actor(name, namespace=NAMESPACE))
        except ValueError:
            continue  # It ended since it was listed.
        try:
            answers[name] = calls, calls.status()
        except RayError as error:
            failure = error
    if not answers:
        raise failure or NoPolicy(f"the policy actor of {app_name} has just ended; try again")
    name = max(answers, key=lambda name: standing(answers[name][1]))
    calls, status = answers.pop(name)
    others = {other: len(_live(answer[1])) for other, answer in answers.items()}
    return Found(app_name, name, calls, status, others)


def standing(status: Mapping[str, Any]) -> tuple[float, float]:
    """Orders the actors of one application: greatest for the one that its newest replicas report to."""
    newest = max((entry["report"]["booted_at"] for entry in _live(status)), default=-math.inf)
    heard_s_ago = (entry["heard_s_ago"] for entry in status["replicas"].values())
    return newest, -min(heard_s_ago, default=math.inf)


def _live(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replicas that follow this actor now."""
    return [entry for entry in status["replicas"].values() if entry["leased"]]


def _choose(app_name: str | None, listed: list[str]) -> tuple[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for name in sorted(listed):
        application = application_of(name)
        if application is not None:
            names[application].append(name)
    if not names:
        raise NoPolicy("this Ray has no policy actor; deploy an application and wait for its first replica")
    if app_name is None and len(names) > 1:
        raise NoPolicy(f"--app: not given, and this Ray has several; choose {' or '.join(names)}")
    chosen = next(iter(names)) if app_name is None else checks.one_of("--app", app_name, names)
    return chosen, names[chosen]
