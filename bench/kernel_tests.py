"""Runs the tests of the kernels on this machine's GPU and records what passed in bench/data.

    python bench/kernel_tests.py [pytest arguments]

Writes kernel-tests-<device>.json: device, versions, date, counts by file, the names of failures.
"""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from nestedfp.kernels import gpu

ROOT = Path(__file__).resolve().parent.parent


class Recorder:
    """A pytest plugin that counts outcomes by file."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.nodeid.partition("::")[0]][report.outcome] += 1
            if report.outcome == "failed":
                self.failures.append(report.nodeid)


def main(arguments: list[str]) -> int:
    gpu.require_gpu("kernel_tests")
    recorder = Recorder()
    options = ["--rootdir", str(ROOT), "-q", "-m", "gpu", *arguments]
    code = pytest.main([*options, str(ROOT / "tests" / "kernels")], plugins=[recorder])
    result = {
        "header": gpu.describe(),
        "complete": code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
        "totals": dict(sum(recorder.counts.values(), Counter[str]())),
        "files": {path: dict(counts) for path, counts in sorted(recorder.counts.items())},
        "failures": recorder.failures,
    }
    out = ROOT / "bench" / "data" / f"kernel-tests-{gpu.slug()}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
