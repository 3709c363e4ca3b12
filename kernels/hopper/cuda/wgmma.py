"""wgmma as C++ functions, written out for one width: an instruction names every accumulator register."""


def wgmma_header(columns: int, kind: str, a_in_registers: bool) -> str:
    """A header that defines `wgmma(sums, a, b, keep)`: sums = keep * sums + a b, 64 rows by `columns`.

    kind: "f16", "bf16" or "e4m3", of both operands; accumulators are float32. K is 32 bytes of an operand.
    a: the thread's four registers of it, or a shared-memory descriptor. b: a descriptor, K adjacent.
    """
    if columns % 8 or not 8 <= columns <= 256:
        raise ValueError(f"columns is {columns}, expected a multiple of 8 from 8 to 256")
    if kind not in ("f16", "bf16", "e4m3"):
        raise ValueError(f"kind is {kind!r}, expected f16, bf16 or e4m3")
    count = columns // 2
    depth = 32 if kind == "e4m3" else 16
    a_count = 4 if a_in_registers else 1
    sums = ", ".join(f"%{i}" for i in range(count))
    a_names = [f"%{count + i}" for i in range(a_count)]
    a_text = f"{{{', '.join(a_names)}}}" if a_in_registers else a_names[0]
    b_name, keep_name = f"%{count + a_count}", f"%{count + a_count + 1}"
    transposes = "" if kind == "e4m3" else ", 0" if a_in_registers else ", 0, 0"
    instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k{depth}.f32.{kind}.{kind}"
    outputs = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    a_type = "const u32* a" if a_in_registers else "u64 a"
    a_inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if a_in_registers else '"l"(a)'
    return f"""#pragma once
__device__ __forceinline__ void wgmma(float (&sums)[{count}], {a_type}, u64 b, int keep) {{
  asm volatile(
      "{{ .reg .pred p; setp.ne.b32 p, {keep_name}, 0; "
      "{instruction} {{{sums}}}, {a_text}, {b_name}, p, 1, 1{transposes}; }}"
      : {outputs}
      : {a_inputs}, "l"(b), "r"(keep));
}}
"""
