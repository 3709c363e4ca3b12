"""Programs beside the tests, which need processes of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def findings(program: str) -> dict[str, dict[str, Any]]:
    """By name what the file `program` prints, a JSON line for each model; fails with its errors."""
    command = [sys.executable, str(Path(__file__).with_name(program))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    return {line["name"]: line for line in lines}
