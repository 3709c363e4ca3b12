"""What differs between Triton 3.6 and 3.9 in the parts of Gluon used here.

Seen: 3.6.0 names a bulk copy `tma.async_copy_global_to_shared` and a bulk store
`tma.async_copy_shared_to_global`; 3.9.0 renames them `async_load` and `async_store` and warns about the old
names. The stage that a Gluon source enters the compiler at is "ttgir" in 3.6.0 and "glir" in 3.9.0.
"""

from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["async_load", "async_store", "gdc_launch_dependents", "gdc_wait", "store_wait"]

if hasattr(tma, "async_load"):
    async_load = tma.async_load
    async_store = tma.async_store
else:
    async_load = tma.async_copy_global_to_shared
    async_store = tma.async_copy_shared_to_global

store_wait = tma.store_wait
