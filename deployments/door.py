"""The door of a replica: what stands between the network and an engine's OpenAI application, in order."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping

from nestedfp.deployments.admission import ApiKeys, BodyLimit, KnownRoutes, PrecisionClass
from nestedfp.deployments.asgi import App
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.precision_report import PrecisionReport, Served
from nestedfp.deployments.signals import RequestWindow


class Door:
    """`app` serves `openai` behind routes, keys, size and precision class, and says what served an answer."""

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
        keys = [key for key in os.environ.get(http.api_keys_variable, "").split(",") if key]
        report = PrecisionReport(
            openai,
            replica=replica,
            precision=precision,
            tokens=tokens,
            arrived=window.arrived,
            served=served,
        )
        self._classes = PrecisionClass(
            report,
            limit=http.max_strict_requests,
            wait_s=settings.strict_wait_s,
            retry_after_s=http.retry_after_s,
            nested=settings.engine.nested,
        )
        self.app: App = KnownRoutes(ApiKeys(BodyLimit(self._classes, http.max_body_bytes), keys))

    @property
    def strict_waiting(self) -> int:
        """Requests that demand 16 bits and wait for a place."""
        return self._classes.waiting
