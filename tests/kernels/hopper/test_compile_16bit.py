"""The Hopper 16-bit kernel compiled for sm_90a without a GPU: what its machine code holds."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from nestedfp.kernels.dispatch import Backend, Mode, table  # noqa: E402
from nestedfp.kernels.hopper.choose_16bit import SHARED_MEMORY, Config16  # noqa: E402
from nestedfp.kernels.hopper.gemm_16bit import gemm_16bit_kernel  # noqa: E402

from .machine_code import disassemble  # noqa: E402


def compile_kernel(config: Config16, dtype: str) -> tuple[str, int]:
    """The SASS of `config` for "fp16" or "bf16", and the bytes of shared memory it asks for."""

    def descriptor(element: str, box: list[int], layout: gl.NVMMASharedLayout) -> str:
        return f"tensordesc<{element}{box},{layout!r}>"

    weights = descriptor("u8", [config.rows, 64], gl.NVMMASharedLayout(64, 8, 2))
    activations = gl.NVMMASharedLayout(128, 16, 2)
    constants = {
        "CONSUMERS": config.consumers,
        "COLUMNS": config.columns,
        "STAGES": config.stages,
        "GROUP": config.group,
        "CHUNK": config.chunk,
        "BULK_STORE": True,
    }
    signature = {
        "x": descriptor(dtype, [config.columns, 64], activations),
        "upper": weights,
        "lower": weights,
        "y": descriptor(dtype, [config.chunk, config.rows], activations),
        "row_exponent": "*i8",
        "bias": f"*{dtype}",
        "partials": "*fp32",
        "counters": "*i32",
        **dict.fromkeys(("M", "N", "K", "y_pitch", "stream_tiles"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    names = list(gemm_16bit_kernel.arg_names)
    source = GluonASTSource(
        gemm_16bit_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index("partials"),): [["tt.divisibility", 16]]},
    )
    options = {"num_warps": config.rows // 16, "launch_pdl": True}
    if config.occupancy == 2:
        options["maxnreg"] = 128
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return disassemble(kernel.asm["cubin"]), kernel.metadata.shared


SOME = [Config16(128, 1, 256, 4), Config16(64, 2, 128, 5), Config16(64, 1, 16, 5, occupancy=2)]


def tabled() -> list[Config16]:
    """The distinct kernels of the table: how work is shared is decided at launch."""
    rows = (row.config for row in table(Backend.HOPPER, (9, 0)) if row.mode is Mode.BITS16)
    cut = {Config16(**{**row, "split": 0, "group": 8}) for row in rows if "consumers" in row}
    return sorted(cut, key=repr)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("config", dict.fromkeys([*SOME, *tabled()]), ids=repr)
def test_machine_code(config: Config16, dtype: str) -> None:
    sass, shared = compile_kernel(config, dtype)
    products = re.findall(r"HGMMA\.64x(\d+)x16\.F32(?:\.BF16)? R\d+, (\w+)", sass)
    assert products
    assert all(int(columns) == config.columns for columns, _ in products)
    assert all(operand.startswith("R") for _, operand in products), "weights must come from registers"
    assert not re.search(r"\b(LDL|STL)\b", sass), "registers spill to local memory"
    offsets = set(re.findall(r"(\w+)(?:\.\w+)* R\d+, .*-0x400040", sass))
    assert offsets == {"IMAD"}, "the lower byte's offset must not load the integer pipe"
    assert sass.count("WARPGROUP.DEPBAR") <= 3 * config.consumers, "ptxas runs products one at a time"
    assert shared <= config.shared_memory <= SHARED_MEMORY
