"""The wheel installs everything under `nestedfp`, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("kernels", "policies", "deployments", "loadtests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("nestedfp-*.whl"))


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in ROOT.glob("nestedfp/**/*.py")}
    for part in PARTS:
        expected |= {f"nestedfp/{path.relative_to(ROOT)}" for path in ROOT.glob(f"{part}/**/*.py")}
        expected |= {f"nestedfp/{path.relative_to(ROOT)}" for path in ROOT.glob(f"{part}/**/*.yaml")}
        expected |= {f"nestedfp/{path.relative_to(ROOT)}" for path in ROOT.glob(f"{part}/tables/*.json")}
    assert expected <= packed
    assert all(name.startswith("nestedfp/") for name in packed)


def test_the_installed_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    names = ["nestedfp", *(f"nestedfp.{part}" for part in PARTS), "nestedfp.vllm", "nestedfp.cli"]
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import importlib\n"
        f"for name in {names!r}:\n"
        f"    path = importlib.import_module(name).__file__\n"
        f"    assert path.startswith({str(site)!r}), path\n"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    # -S -s would drop the dependencies too; the editable install is a finder, which sys.path precedes only
    # once it is removed.
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        + program
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=empty, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_package_itself_loads_neither_torch_nor_vllm(tmp_path: Path) -> None:
    program = (
        "import nestedfp, nestedfp.policies, nestedfp.loadtests, nestedfp.cli, sys;"
        "assert not {'torch', 'vllm', 'ray'} & set(sys.modules), set(sys.modules) & {'torch', 'vllm', 'ray'}"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
