"""A thin layer over llvmlite for writing vector kernels, and their compilation for this machine.

Kernels are emitted as LLVM IR with explicit vectors and compiled in memory: no C compiler, no cache on
disk, about half a second a process. llvmlite is what numba, which vLLM brings anyway, is made of.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import llvmlite.binding as llvm
from llvmlite import ir

I1 = ir.IntType(1)
I8 = ir.IntType(8)
I16 = ir.IntType(16)
I32 = ir.IntType(32)
I64 = ir.IntType(64)
F16 = ir.HalfType()
F32 = ir.FloatType()
PTR = ir.PointerType()
VOID = ir.VoidType()
NULL = ir.Constant(PTR, None)

_SIZES = {I8: 1, I16: 2, F16: 2, I32: 4, F32: 4, I64: 8, PTR: 8}
_MANGLED = {F16: "f16", F32: "f32", I32: "i32"}


class UnsupportedProcessorError(RuntimeError):
    """The processor lacks instructions that the kernels need."""


def lanes_of(type_: ir.Type) -> int:
    return int(type_.count) if isinstance(type_, ir.VectorType) else 1


def vector(element: ir.Type, lanes: int) -> ir.Type:
    """`lanes` elements; one lane is the plain element."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def splat(type_: ir.Type, number: float) -> ir.Constant:
    """The constant `number` as a scalar of `type_`, or in every lane of it."""
    lanes = lanes_of(type_)
    return ir.Constant(type_, number if lanes == 1 else [number] * lanes)


def i64(number: int) -> ir.Constant:
    return ir.Constant(I64, number)


class Body:
    """The body of one function: an IR builder with loops, locals and element-wise memory access.

    Locals are stack slots; LLVM turns them into registers. Offsets count elements of the type accessed.
    """

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.module = function.module
        self._entry = function.append_basic_block("entry")
        self._start = function.append_basic_block("start")
        self.ir = ir.IRBuilder(self._start)

    def finish(self) -> None:
        """Closes the function; called once, last."""
        self.ir.ret_void()
        with self.ir.goto_block(self._entry):
            self.ir.branch(self._start)

    def local(self, type_: ir.Type, value: ir.Value | None = None) -> ir.Value:
        """The address of a new local, set to `value` at this point."""
        with self.ir.goto_block(self._entry):
            slot = self.ir.alloca(type_)
        if value is not None:
            self.ir.store(value, slot)
        return slot

    def address(self, base: ir.Value, offset: ir.Value | int, element: ir.Type) -> ir.Value:
        index = i64(offset) if isinstance(offset, int) else offset
        return self.ir.gep(base, [index], source_etype=element)

    def load(self, base: ir.Value, offset: ir.Value | int, element: ir.Type, lanes: int = 1) -> ir.Value:
        value = self.ir.load(self.address(base, offset, element), typ=vector(element, lanes))
        value.align = _SIZES[element]
        return value

    def store(self, value: ir.Value, base: ir.Value, offset: ir.Value | int, element: ir.Type) -> None:
        self.ir.store(value, self.address(base, offset, element), align=_SIZES[element])

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """`for i in range(start, stop, step)` over 64-bit signed integers."""
        slot = self.local(I64, start)
        head, inside, after = (self.function.append_basic_block(name) for name in ("head", "loop", "done"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        index = self.ir.load(slot, typ=I64)
        self.ir.cbranch(self.ir.icmp_signed("<", index, stop), inside, after)
        self.ir.position_at_end(inside)
        yield index
        self.ir.store(self.ir.add(index, i64(step)), slot)
        self.ir.branch(head)
        self.ir.position_at_end(after)

    def call(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        """Calls the external function `name`."""
        function = self.module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [operand.type for operand in operands])
            function = ir.Function(self.module, signature, name)
        return self.ir.call(function, operands)

    def intrinsic(self, name: str, *operands: ir.Value, result: ir.Type | None = None) -> ir.Value:
        """The LLVM intrinsic `name` on the type of its first operand."""
        type_ = operands[0].type
        lanes = lanes_of(type_)
        suffix = _MANGLED[type_] if lanes == 1 else f"v{lanes}{_MANGLED[type_.element]}"
        return self.call(f"llvm.{name}.{suffix}", result or type_, *operands)

    def prefetch(self, address: ir.Value) -> None:
        """Asks for the cache line at `address`, to be read soon, into every level."""
        read, every_level, data = (ir.Constant(I32, number) for number in (0, 3, 1))
        self.call("llvm.prefetch.p0", VOID, address, read, every_level, data)

    def clear(self, base: ir.Value, count: ir.Value) -> None:
        """Sets `count` bytes from `base` to zero."""
        self.call("llvm.memset.p0.i64", VOID, base, ir.Constant(I8, 0), count, ir.Constant(I1, 0))

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two signed integers."""
        return self.ir.select(self.ir.icmp_signed("<", a, b), a, b)

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        if lanes == 1:
            return value
        single = self.ir.insert_element(
            ir.Constant(vector(value.type, lanes), ir.Undefined), value, ir.Constant(I32, 0)
        )
        return self.shuffle(single, single, [0] * lanes)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        """The chosen lanes of `a` followed by `b`."""
        return self.ir.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))


def define(
    module: ir.Module,
    name: str,
    parameters: Mapping[str, ir.Type],
    emit: Callable[[Body, SimpleNamespace], None],
    *,
    public: bool = False,
) -> ir.Function:
    """Adds a function to `module`; `emit(body, arguments)` writes it. Pointer arguments must not alias."""
    function = ir.Function(module, ir.FunctionType(VOID, list(parameters.values())), name)
    if not public:
        function.linkage = "internal"
        function.attributes.add("noinline")
    for argument, label in zip(function.args, parameters, strict=True):
        argument.name = label
        if argument.type == PTR:
            argument.add_attribute("noalias")
    body = Body(function)
    emit(body, SimpleNamespace(**dict(zip(parameters, function.args, strict=True))))
    body.finish()
    return function


class Program:
    """A compiled module. It must outlive the addresses taken from it."""

    def __init__(self, module: ir.Module) -> None:
        machine = _target_machine()
        for name, address in _openmp_symbols().items():
            llvm.add_symbol(name, address)
        module.triple = llvm.get_process_triple()
        module.data_layout = str(machine.target_data)
        compiled = llvm.parse_assembly(str(module))
        compiled.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=2)
        # The vectors are explicit and the loops as wide as the registers: more of either only takes time.
        options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(compiled, passes)
        self._engine = llvm.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    needed = ("avx2", "fma", "f16c") if llvm.get_process_triple().startswith("x86_64") else ()
    missing = [name for name in needed if not features.get(name)]
    if missing:
        raise UnsupportedProcessorError(
            f"this processor ({llvm.get_host_cpu_name()}) lacks {', '.join(missing)}, which the CPU products "
            "need; use an x86 processor from 2015 or later, or a GPU"
        )
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=2, jit=True
    )


@cache
def _openmp_symbols() -> dict[str, int]:
    """The OpenMP functions that torch, loaded before, uses in this process: both then share one pool."""
    process = ctypes.CDLL(None)
    symbols = {}
    for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"):
        address = ctypes.cast(getattr(process, name), ctypes.c_void_p).value
        assert address is not None
        symbols[name] = address
    return symbols
