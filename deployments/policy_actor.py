"""The policy actor in Ray: one detached, named actor an application and version of the policy.

The name carries a digest of the policy's code and settings: after a redeploy with either changed, the new
replicas meet a new actor and never an instance of the old class. State is soft, so nothing is handed over.
Whoever needs the actor creates it if it is absent; it ends by itself when no replica has called for a while
and no pin is in force, since with it a pin would end.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError

from nestedfp import policies
from nestedfp.policies.actor import PolicyActor
from nestedfp.policies.config import PolicyConfig
from nestedfp.policies.replica import ActorUnavailable

NAMESPACE: Final = "nestedfp"
_PREFIX: Final = "nestedfp-policy"
_LONELY_S: Final = 60.0
_ON_THE_HEAD: Final = {"node:__internal_head__": 0.001}
"""A share of what Ray gives its head node alone: elsewhere the actor would keep a node that is drained, or
that nothing else needs, from ending.
"""
_CONCURRENT_CALLS: Final = 10_000
"""The long poll of each replica holds one nearly all the time. Behind those of 1,000 replicas, Ray's default,
status and pins would wait.
"""

logger = logging.getLogger(__name__)


class PolicyService(PolicyActor):
    """The policy as a Ray actor: ends its process when no replica has called for `lonely_s`, but never while
    a pin is in force.
    """

    def __init__(self, config: Mapping[str, Any], lonely_s: float = _LONELY_S) -> None:
        super().__init__(config)
        self._lonely_s = lonely_s
        self._calls = 0
        self._watch: asyncio.Task[None] | None = None

    async def sync(self, report: Mapping[str, Any], known_epoch: int, wait_s: float) -> dict[str, Any]:
        self._calls += 1
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_lonely())
        return await super().sync(report, known_epoch, wait_s)

    @property
    def _pinned(self) -> bool:
        return self._override is not None and self._override.active(self._now())

    async def _end_when_lonely(self) -> None:
        seen = -1
        while seen != self._calls or self._pinned:
            seen = self._calls
            await asyncio.sleep(self._lonely_s)
        logger.info("no replica has called for %g s: the policy actor ends", self._lonely_s)
        ray.kill(ray.get_runtime_context().current_actor)


def actor_name(app_name: str, config: PolicyConfig) -> str:
    """`nestedfp-policy::<application>::<digest of the policy's code and settings>`."""
    digest = hashlib.sha256(_code())
    digest.update(json.dumps(config.to_dict(), sort_keys=True).encode())
    return f"{_PREFIX}::{app_name}::{digest.hexdigest()[:12]}"


def application_of(name: str) -> str | None:
    """The application whose policy actor has this name; None for the name of anything else."""
    kind, _, rest = name.partition("::")
    application, _, digest = rest.rpartition("::")
    return application if kind == _PREFIX and application and digest else None


@cache
def _code() -> bytes:
    """The digest of the policy's source as this process found it: a later edit is not what it runs."""
    digest = hashlib.sha256()
    for source in sorted([*Path(policies.__path__[0]).rglob("*.py"), Path(__file__)]):
        digest.update(source.read_bytes())
    return digest.digest()


def find_or_create(app_name: str, config: PolicyConfig) -> Any:
    """A handle to the application's policy actor. Blocks; needs a connection to Ray."""
    return (
        ray.remote(PolicyService)
        .options(
            name=actor_name(app_name, config),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=_ON_THE_HEAD,
            max_restarts=0,
            max_concurrency=_CONCURRENT_CALLS,
        )
        .remote(config.to_dict())
    )


def end(app_name: str, config: PolicyConfig) -> bool:
    """Kill the application's policy actor; False where there was none."""
    try:
        ray.kill(ray.get_actor(actor_name(app_name, config), namespace=NAMESPACE))
    except ValueError:
        return False
    return True


class PolicyLink:
    """A replica's line to the policy actor: finds it, creates it if absent, and finds it anew after it was
    lost.
    """

    def __init__(self, app_name: str, config: PolicyConfig) -> None:
        self._app_name = app_name
        self._config = config
        self._actor: Any = None
        self._search: asyncio.Task[Any] | None = None
        self._owner: str | None = None

    async def sync(self, report: dict[str, Any], known_epoch: int, wait_s: float) -> Mapping[str, Any]:
        """One call of the protocol. Raises :class:`ActorUnavailable` where the actor is gone or refuses."""
        try:
            if self._actor is None:
                self._actor = await self._found()
            answer: Mapping[str, Any] = await self._actor.sync.remote(report, known_epoch, wait_s)
        except (RayError, ValueError) as error:
            self._actor = None
            cause = getattr(error, "cause", None) or error
            raise ActorUnavailable(str(cause).partition("\n")[0] or type(cause).__name__) from error
        owner = answer.get("owner")
        if self._owner not in (None, owner):
            logger.warning("another policy actor answers: a pin of the one before has ended with it")
        self._owner = owner
        return answer

    async def _found(self) -> Any:
        """The actor. One search at a time: each blocks a thread, and callers are less patient than Ray."""
        if self._search is None:
            search = asyncio.to_thread(find_or_create, self._app_name, self._config)
            self._search = asyncio.create_task(search)
        try:
            return await asyncio.shield(self._search)
        finally:
            if self._search.done():
                self._search = None
