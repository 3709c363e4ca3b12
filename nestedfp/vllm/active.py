"""The plan in force in this process, and the record of the precision that each layer's operator chose.

There is one owner, `ACTIVE`: layers read it inside the opaque operator, only the worker writes it, and
only between steps.
"""

from collections import Counter
from itertools import chain, count
from weakref import ref

import torch
from torch import Tensor

from nestedfp.precision import Precision
from nestedfp.vllm.plan import FP16, Plan

NESTED = "nested"
FUSED = "fused"
_CODES = {Precision.FP16: 1, Precision.FP8: 2}


class LayerRecord:
    """One byte a layer, on the layers' device, that the operator sets to the precision it has chosen.

    On a GPU that is a launch of its own, just before the product's. A CUDA graph replays both as they were
    captured, so the byte tells the precision that the replayed graph was captured in, not what was asked for.
    It does not look into the product: that the kernels launched after it are of this precision follows from
    the operator's code, and what they compute is for tests of results. The byte of a layer that a step did
    not run stays 0. Layers are told apart by the address of their row exponents, which are never moved.
    """

    def __init__(self, kinds: dict[int, str], device: torch.device) -> None:
        """`kinds` maps the address of each nested layer's row exponents to the layer's kind."""
        self._kinds = list(kinds.values())
        self._position = {address: position for position, address in enumerate(kinds)}
        self._marks = torch.zeros(len(kinds), dtype=torch.int8, device=device)
        self._host = self._marks.numpy() if device.type == "cpu" else None

    def write(self, row_exponent: Tensor, precision: Precision) -> None:
        position = self._position[row_exponent.data_ptr()]
        if self._host is not None:
            self._host[position] = _CODES[precision]
        else:
            self._marks[position].fill_(_CODES[precision])

    def take(self) -> bytes:
        """The bytes written since the last call, in the order of the load; waits for the device."""
        marks = bytes(self._marks.tolist())
        self._marks.zero_()
        return marks

    def mismatches(self, marks: bytes, plan: Plan) -> int:
        """Layers of `marks` that did not choose the precision that `plan` gives them."""
        return sum(
            mark != _CODES[plan.precision(kind)] for mark, kind in zip(marks, self._kinds, strict=True)
        )


class ActivePlan:
    """The plan in force, the states of the linear layers, and the record where steps are checked."""

    def __init__(self) -> None:
        self.plan = FP16
        self.record: LayerRecord | None = None
        self.layers: dict[str, str] = {}
        """By layer name: `nested`, or the reason it stayed plain."""
        self.mlps: dict[str, str] = {}
        """By the name of a layer beside a SiluAndMul, of a gate and its partner: `fused`, or the reason why
        not."""
        self.inexact_rows: dict[str, int] = {}
        """By layer name: rows of a nested layer that do not rebuild bit for bit, where there are any."""
        self.loads = 0
        """Layers noted so far, again at each reload: where it has grown, what is known of them may be new."""
        self._kinds: dict[int, str] = {}
        self._after: dict[int, tuple[str, ref[Tensor], ref[Tensor]]] = {}
        """By layer, the kind and planes of the one after it; weak, as the layers own their bytes."""

    def clear(self) -> None:
        """Forgets the layers of an engine that lived in this process before."""
        self.plan, self.record = FP16, None
        for known in (self.layers, self.mlps, self.inexact_rows, self._kinds, self._after):
            known.clear()

    def note_layer(self, name: str, state: str) -> None:
        """Notes a layer's state at load."""
        self.layers[name] = state
        self.loads += 1

    def unique_name(self, name: str) -> str:
        """A name for a layer that is not noted yet: `name`, numbered where another layer has it.

        Some models give their layers no names.
        """
        numbered = (f"{name}#{number}" for number in count(2))
        return next(free for free in chain([name], numbered) if free not in self.layers)

    def note_nested(self, name: str, kind: str, upper: Tensor, lower: Tensor, row_exponent: Tensor) -> None:
        """Notes a layer that is nested for the first time; the address of its row exponents identifies it.

        Layers are loaded in the order in which a decoder runs them. A reload copies into the storage of the
        first load, and is noted by `note_layer`.
        """
        self.note_layer(name, NESTED)
        if self._kinds:
            self._after[next(reversed(self._kinds))] = kind, ref(upper), ref(lower)
        self._kinds[row_exponent.data_ptr()] = kind

    def read_after(self, row_exponent: Tensor) -> tuple[Tensor, ...]:
        """The bytes that the layer after this one reads under the plan in force; none after the last."""
        following = self._after.get(row_exponent.data_ptr())
        if following is None:
            return ()
        kind, upper, lower = following
        fp8 = self.plan.precision(kind) is Precision.FP8
        planes = (upper(),) if fp8 else (upper(), lower())
        return tuple(plane for plane in planes if plane is not None)

    def start_recording(self, device: torch.device) -> None:
        """Records from now on; to be called after the load and before anything is captured."""
        self.record = LayerRecord(self._kinds, device)

    def layer_counts(self) -> tuple[dict[str, int], dict[str, int]]:
        """Layers by state (`nested`, `plain`), and the reasons for `plain` with their counts."""
        reasons = Counter(state for state in self.layers.values() if state != NESTED)
        plain = reasons.total()
        return {"nested": len(self.layers) - plain, "plain": plain}, dict(reasons)

    def mlp_counts(self) -> tuple[int, dict[str, int]]:
        """How many MLPs are fused, and the reasons of those that are not with their counts."""
        reasons = Counter(state for state in self.mlps.values() if state != FUSED)
        return len(self.mlps) - reasons.total(), dict(reasons)


def layer_kind(name: str) -> str:
    """The last part of a layer's name: what plans are written in."""
    return name.rpartition(".")[2]


ACTIVE = ActivePlan()
