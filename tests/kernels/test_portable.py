"""The portable kernels in Triton's interpreter, against float64 on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The interpreter is chosen when Triton is first imported, so the products run in a process of their own.
SCRIPT = Path(__file__).with_name("portable_in_interpreter.py")

# The interpreter converts to bfloat16 coarsely, unlike a GPU; a wrong weight gives errors near 1.
TOLERANCE = {"float16": 6e-4, "bfloat16": 3e-2}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report: dict[str, dict[str, float]] = json.loads(run.stdout)
    return report


def test_products_match_float64(errors: dict[str, dict[str, float]]) -> None:
    assert len(errors["product"]) >= 40
    for case, error in errors["product"].items():
        assert error < TOLERANCE[case.split()[1]], case


def test_rebuild_is_exact(errors: dict[str, dict[str, float]]) -> None:
    assert errors["rebuild"] == {"natural": 0.0, "hopper128": 0.0}


def test_quantizer_equals_reference(errors: dict[str, dict[str, float]]) -> None:
    assert set(errors["quantize"].values()) == {0.0}


def test_columns_may_lie_beyond_2_31_elements(errors: dict[str, dict[str, float]]) -> None:
    assert errors["far"] == {"16-bit": 0.0, "fp8": 0.0}
