"""The portable kernels compiled without a GPU for the architectures they are meant for."""

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from nestedfp.kernels.dispatch import Config  # noqa: E402
from nestedfp.kernels.portable.gemm import gemm_kernel, quantize_kernel  # noqa: E402
from nestedfp.kernels.portable.linear import default_config  # noqa: E402

E4M3_FROM = 89


def compile_gemm(capability: int, mode: str, dtype: str, tile: Config, *, permuted: bool) -> str:
    """The PTX of the product as `portable.linear` launches it on that architecture."""
    fp8 = mode == "fp8"
    native = fp8 and capability >= E4M3_FROM
    constants = {
        "FP8": fp8, "NATIVE": native, "WIDE": False, "PERMUTED": permuted, "PANELS": permuted,
        **{name: tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")},
    }  # fmt: skip
    if fp8:
        constants["lower_ptr"] = None
    else:
        constants["row_scale_ptr"] = None
    signature = {
        "a_ptr": "*fp8e4nv" if native else "*fp16" if fp8 else f"*{dtype}",
        "upper_ptr": "*u8", "lower_ptr": "*u8", "y_ptr": f"*{dtype}", "row_exponent_ptr": "*i8",
        "row_scale_ptr": "*fp32", "bias_ptr": f"*{dtype}",
        **dict.fromkeys(("M", "N", "K", "a_stride_m", "a_stride_k"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    source = ASTSource(gemm_kernel, {name: signature[name] for name in gemm_kernel.arg_names}, constants)
    options = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert kernel.metadata.shared <= (99 if capability in (89, 120) else 163) * 1024
    text: str = kernel.asm["ptx"]
    assert not re.search(r"\.local\b", text), "an array went to local memory"
    return text


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize(("mode", "dtype"), [("16-bit", "fp16"), ("16-bit", "bf16"), ("fp8", "bf16")])
def test_products_use_tensor_cores(capability: int, mode: str, dtype: str) -> None:
    for M in (1, 4096):
        text = compile_gemm(capability, mode, dtype, default_config(M), permuted=mode == "16-bit")
        products = re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", text)
        assert products
        if mode == "fp8" and capability == E4M3_FROM:
            assert all("e4m3" in product for product in products)


@pytest.mark.parametrize(("capability", "codes"), [(80, "*fp16"), (89, "*fp8e4nv"), (100, "*fp8e4nv")])
def test_the_quantiser_compiles(capability: int, codes: str) -> None:
    constants = {"PERMUTED": True, "BLOCK_K": 1024}
    signature = {
        "x_ptr": "*bf16", "codes_ptr": codes, "scale_ptr": "*fp32",
        **dict.fromkeys(("K", "x_stride_m", "x_stride_k"), "i32"), **dict.fromkeys(constants, "constexpr"),
    }  # fmt: skip
    source = ASTSource(quantize_kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
