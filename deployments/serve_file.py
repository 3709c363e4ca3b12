"""The file that describes an application: one YAML file holds everything.

It is a Ray Serve file, so `serve deploy FILE` takes it as it is; the settings of
`nestedfp.deployments.config` are the `args` of its application, and `nestedfp serve --config FILE` starts the
same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from nestedfp.deployments.config import REQUEST_TIMEOUT_S, DeploymentSettings
from nestedfp.policies import checks
from nestedfp.policies.checks import InvalidField

IMPORT_PATH: Final = "nestedfp.deployments.app:build_app"

_FILE_KEYS: Final = ("applications", "http_options", "proxy_location")
_APPLICATION_KEYS: Final = ("name", "route_prefix", "import_path", "args")
_HTTP_KEYS: Final = ("host", "port", "request_timeout_s")
_LAST_PORT: Final = 65535
PROXY_LOCATIONS: Final = ("HeadOnly", "EveryNode")
"""Ray Serve's, but for `Disabled`: an OpenAI endpoint without an HTTP server answers nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFile:
    """One Serve file with one NestedFP application."""

    app_name: str
    route_prefix: str
    host: str
    port: int
    request_timeout_s: float
    proxy_location: str
    settings: DeploymentSettings

    def __post_init__(self) -> None:
        checks.one_of("proxy_location", self.proxy_location, PROXY_LOCATIONS)
        if checks.integer("http_options.port", self.port, minimum=1) > _LAST_PORT:
            raise InvalidField("http_options.port", self.port, f"give a port of at most {_LAST_PORT}")
        if not self.route_prefix.startswith("/"):
            remedy = "give a path that begins with '/'"
            raise InvalidField("applications[0].route_prefix", self.route_prefix, remedy)
        allowed_s = self.settings.replicas.graceful_shutdown_timeout_s
        if allowed_s < self.request_timeout_s:
            remedy = (
                f"give at least http_options.request_timeout_s, {self.request_timeout_s:g}: a replica that "
                "must go breaks off answers that take longer"
            )
            raise InvalidField("replicas.graceful_shutdown_timeout_s", allowed_s, remedy)

    @property
    def url(self) -> str:
        """Base URL of the OpenAI API on this machine."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}/v1"

    @classmethod
    def load(cls, path: Path) -> ServeFile:
        """Read a YAML file. Raises :class:`InvalidField`, or OSError where it cannot be read."""
        try:
            content = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidField(str(path), str(error), "write valid YAML") from None
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ServeFile:
        """Read the content of a Serve file. What only `serve deploy` heeds is refused, not passed over."""
        if not isinstance(content, Mapping):
            raise InvalidField("file", content, "give a Serve file: a mapping with applications")
        _refuse_others("", content, _FILE_KEYS)
        applications = content.get("applications")
        if not isinstance(applications, list) or len(applications) != 1:
            raise InvalidField("applications", applications, "give a list of exactly one application")
        application = applications[0]
        if not isinstance(application, Mapping):
            raise InvalidField("applications[0]", application, "give a mapping with import_path and args")
        _refuse_others("applications[0].", application, _APPLICATION_KEYS)
        if application.get("import_path") != IMPORT_PATH:
            raise InvalidField(
                "applications[0].import_path", application.get("import_path"), f"give {IMPORT_PATH}"
            )
        http = content.get("http_options", {})
        if not isinstance(http, Mapping):
            raise InvalidField("http_options", http, "give a mapping with host, port and request_timeout_s")
        _refuse_others("http_options.", http, _HTTP_KEYS)
        return cls(
            app_name=checks.name("applications[0].name", application.get("name", "nestedfp")),
            route_prefix=checks.text("applications[0].route_prefix", application.get("route_prefix", "/")),
            host=checks.text("http_options.host", http.get("host", "127.0.0.1")),
            port=checks.integer("http_options.port", http.get("port", 8000), minimum=1),
            request_timeout_s=checks.number(
                "http_options.request_timeout_s",
                http.get("request_timeout_s", REQUEST_TIMEOUT_S),
                above=0.0,
            ),
            proxy_location=content.get("proxy_location", "HeadOnly"),
            settings=DeploymentSettings.from_dict(application.get("args", {})),
        )


def _refuse_others(place: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key, value in given.items():
        if key not in known:
            remedy = f"remove it, or use `serve deploy`: here only {', '.join(known)} are heeded"
            raise InvalidField(f"{place}{key}", value, remedy)
