"""`nestedfp serve --config FILE`: the application on this machine until it is interrupted."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import threading
from importlib.resources import files
from pathlib import Path
from typing import Final

from nestedfp import models
from nestedfp.deployments.config import DeploymentSettings
from nestedfp.deployments.interrupt import Interrupted, raise_on_signals
from nestedfp.deployments.serve_file import ServeFile
from nestedfp.policies.checks import InvalidField

DEFAULT_CONFIG: Final = Path(str(files("nestedfp.deployments"))) / "configs" / "cpu-demo.yaml"

_READY: Final = """
The OpenAI API is at {url} (Ctrl-C stops it). Try:

  curl -N {url}/chat/completions -H 'Content-Type: application/json'{header} -d '{{
    "model": "{model}", "max_tokens": 64, "stream": true, "stream_options": {{"include_usage": true}},
    "messages": [{{"role": "user", "content": "Name three rivers."}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}", api_key="{key}")
  stream = client.chat.completions.create(
      model="{model}", messages=[{{"role": "user", "content": "Name three rivers."}}],
      max_tokens=64, stream=True)
  for chunk in stream:
      print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nestedfp serve`."""
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_CONFIG, help="Serve file (default: two replicas on the CPU)"
    )
    parser.add_argument("--model", help="Hugging Face id or folder, instead of the file's engine.model")
    parser.add_argument("--port", type=int, help="HTTP port, instead of the file's http_options.port")
    parser.add_argument("--replicas", type=int, help="instead of the file's replicas.count")
    parser.add_argument("--ray-dir", type=Path, help="folder for Ray's logs and sockets (default: Ray's own)")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; 0 after an orderly end, 1 with a message where it could not serve."""
    from nestedfp.deployments.cluster import StartFailed, running

    raise_on_signals()
    try:
        file = with_overrides(ServeFile.load(args.config), args.model, args.port, args.replicas)
        with running(file, say=_say, temp_dir=args.ray_dir) as app:
            print(ready_message(app.url, app.model, file.settings), flush=True)
            threading.Event().wait()
    except Interrupted:
        pass
    except (InvalidField, StartFailed, models.ModelError, OSError) as error:
        print(f"nestedfp serve: {error}", file=sys.stderr)
        return 1
    _say("stopped")
    return 0


def ready_message(url: str, model: str, settings: DeploymentSettings) -> str:
    """How to call the endpoint; `KEY` stands for an API key where one is demanded."""
    variable = settings.http.api_keys_variable
    demanded = settings.environment.get(variable, os.environ.get(variable))
    header = " -H 'Authorization: Bearer KEY'" if demanded else ""
    return _READY.format(url=url, model=model, header=header, key="KEY" if demanded else "none")


def with_overrides(
    file: ServeFile, model: str | None = None, port: int | None = None, replicas: int | None = None
) -> ServeFile:
    """The file with another model (served under its last path component), port or number of replicas."""
    settings = file.settings.to_dict()
    if model is not None:
        settings["engine"] |= {"model": model, "served_model_name": Path(model).name}
    if replicas is not None:
        if settings["autoscaling"] is not None:
            remedy = "leave it out: the file has autoscaling, which begins with its min_replicas"
            raise InvalidField("--replicas", replicas, remedy)
        settings["replicas"]["count"] = replicas
    changed = type(file.settings).from_dict(settings)
    return dataclasses.replace(file, settings=changed, port=file.port if port is None else port)


def _say(message: str) -> None:
    print(f"nestedfp serve: {message}", flush=True)
