"""The tuner's small kernel, compiled without a GPU."""

import pytest

pytest.importorskip("triton")

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nestedfp.kernels.hopper.copy_tokens import _copy_row


def test_it_waits_before_it_reads_and_lets_the_next_start_before_it_writes() -> None:
    signature = {"source_ptr": "*bf16", "to_ptr": "*bf16", "K": "i32", "BLOCK": "constexpr"}
    source = ASTSource(_copy_row, signature, {"BLOCK": 4096})
    options = {"num_warps": 8, "launch_pdl": True}
    text = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    order = [
        text.index("griddepcontrol.wait"),
        text.index("ld.global"),
        text.index("griddepcontrol.launch_dependents"),
        text.index("st.global"),
    ]
    assert order == sorted(order)
