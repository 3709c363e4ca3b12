"""The door of a replica: what stands between the network and an engine's OpenAI application, in order."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping

from nestedfp.deployments.admission import ApiKeys, BodyLimit, KnownRoutes, PrecisionClass
from nestedfp.deployments.arrival import Arrival
from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.event_pace import EventPace
from nestedfp.deployments.precision_report import PrecisionReport, Served
from nestedfp.deployments.signals import RequestWindow
from nestedfp.policies.checks import InvalidField


class Door:
    """`app` serves `openai` behind routes, keys, size and precision class, says what served an answer, tells
    the engine when a request arrived, and bounds the events of all streams."""

    def __init__(
        self,
        openai: App,
        settings: DeploymentSettings,
        *,
        replica: str,
        precision: Callable[[], str],
        tokens: Callable[[str], Awaitable[Mapping[str, int] | None]],
        window: RequestWindow,
        served: Served,
    ) -> None:
        http = settings.http
        keys = api_keys(http.api_keys_variable)
        report = PrecisionReport(
            Arrival(openai),
            replica=replica,
            precision=precision,
            tokens=tokens,
            arrived=window.arrived,
            served=served,
        )
        self._classes = PrecisionClass(
            EventPace(report, http.events_per_second),
            limit=http.max_strict_requests,
            wait_s=settings.strict_wait_s,
            retry_after_s=http.retry_after_s,
            nested=settings.engine.nested,
            refused=lambda waited_s: served(strict=True, status=503, tokens=None, waited_s=waited_s),
        )
        self.app: App = KnownRoutes(ApiKeys(BodyLimit(self._classes, http.max_body_bytes), keys))

    @property
    def strict_waiting(self) -> int:
        """Requests that demand 16 bits and wait for a place."""
        return self._classes.waiting

    def adopt(self, settings: DeploymentSettings) -> None:
        """Take over a changed SLO, which may be how long a strict request waits."""
        self._classes.wait_s = settings.strict_wait_s


def api_keys(variable: str) -> list[str]:
    """The keys in an environment variable, separated by commas; none where it is unset or empty.

    Raises :class:`InvalidField` where it holds something but no key: an open door was hardly meant.
    """
    text = os.environ.get(variable, "")
    keys = [key.strip() for key in text.split(",") if key.strip()]
    if text and not keys:
        raise InvalidField(variable, text, "give keys separated by commas, or unset it to ask for none")
    return keys
