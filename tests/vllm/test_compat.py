import logging
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config

import nestedfp.vllm
from nestedfp.vllm import compat


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0", "0.33.1", "0.33.0rc1", "0.32.0+cpu", "0.33.1.dev7"])
def test_versions_of_the_range_are_admitted(version: str) -> None:
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "1.0", "dev"])
def test_another_version_is_refused_with_a_way_out(version: str) -> None:
    with pytest.raises(compat.UnsupportedVLLMError, match=r"0\.26 to 0\.33.*set NESTEDFP_ANY_VLLM=1"):
        compat.check_version(version)


def test_the_refusal_can_be_overridden(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(compat.OVERRIDE, "1")
    logger = logging.getLogger("vllm.nestedfp")
    logger.addHandler(caplog.handler)
    compat.check_version("0.34.0")
    logger.removeHandler(caplog.handler)
    assert "continuing because NESTEDFP_ANY_VLLM=1" in caplog.text


@pytest.mark.parametrize(
    ("version", "warned"),
    [("0.26.0", False), ("0.32.0+cpu", False), ("0.26.1", True), ("0.33.1", True), ("0.32.0rc1", True)],
)
def test_a_version_that_never_ran_is_warned_of(
    caplog: pytest.LogCaptureFixture, version: str, warned: bool
) -> None:
    logger = logging.getLogger("vllm.nestedfp")
    logger.addHandler(caplog.handler)
    compat.warn_of_untried(version)
    logger.removeHandler(caplog.handler)
    found = {record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}
    assert len(found) == warned
    assert all(f"has run with vLLM 0.26.0 and 0.32.0, never with {version}" in line for line in found)


def test_an_unsupported_vllm_stays_usable_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: "0.99")
    nestedfp.vllm.register()
    with pytest.raises(compat.UnsupportedVLLMError):
        nestedfp.vllm.engine_arguments("cpu")


def test_engine_arguments_refuse_a_bad_setting_and_device() -> None:
    with pytest.raises(ValueError, match="inexact is 'x'"):
        nestedfp.vllm.engine_arguments("cpu", inexact="x")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        nestedfp.vllm.engine_arguments("tpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [
        ((9, 0), {}, True),
        ((12, 0), {}, True),
        ((8, 9), {}, None),
        ((9, 0), {"triton.enable_pdl": False}, False),
    ],
)
def test_compiled_kernels_start_early_where_the_gpu_can_and_nobody_objects(
    capability: tuple[int, int],
    given: dict[str, bool],
    expected: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    config = SimpleNamespace(inductor_compile_config=given)
    compat.chain_launches(config)
    assert config.inductor_compile_config.get("triton.enable_pdl") is expected
    # torch must know the setting under this name, or compiling would fail.
    with torch._inductor.config.patch(config.inductor_compile_config):
        assert torch._inductor.config.triton.enable_pdl is bool(expected)
