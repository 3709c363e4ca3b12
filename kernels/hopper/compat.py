"""What differs between Triton 3.6 and 3.9 in the parts of Gluon used here.

Seen: 3.6.0 names a bulk copy `tma.async_copy_global_to_shared` and a bulk store
`tma.async_copy_shared_to_global`; 3.9.0 renames them `async_load` and `async_store` and warns about the old
names; it also renames `gl.thread_barrier` to `gl.barrier`. The stage that a Gluon source enters the compiler
at is "ttgir" in 3.6.0 and "glir" in 3.9.0.

In both, assigning a literal inside a loop to a variable made before it (`skip = 0`) is silently dropped: only
values of the device program are carried from one turn to the next. Compute them (`gl.where`).
"""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["async_load", "async_store", "gdc_launch_dependents", "gdc_wait", "store_wait", "thread_barrier"]

if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

store_wait = tma.store_wait
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
