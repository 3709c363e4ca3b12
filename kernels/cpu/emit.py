"""A thin layer over llvmlite for writing vector kernels, and their compilation for this machine.

Kernels are emitted as LLVM IR with explicit vectors and compiled in memory: no C compiler, no cache on
disk, some hundred milliseconds a process. llvmlite is what numba, which vLLM needs anyway, is made of.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

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


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def splat(type_: ir.Type, number: float) -> ir.Constant:
    """The constant `number` as a scalar of `type_`, or in every lane of it."""
    if isinstance(type_, ir.VectorType):
        return ir.Constant(type_, [number] * type_.count)
    return ir.Constant(type_, number)


def i64(number: int) -> ir.Constant:
    return ir.Constant(I64, number)


class Body:
    """The body of one function: an IR builder with loops, locals and element-wise memory access.

    Locals are stack slots; LLVM turns them into registers. Offsets count elements of the type accessed.
    """

    def __init__(self, function: ir.Function) -> None:
        self.function = function
        self.module = function.module
        self.entry = function.append_basic_block("entry")
        start = function.append_basic_block("body")
        self.ir = ir.IRBuilder(start)
        self._start = start

    def finish(self) -> None:
        """Closes the function; call once, last."""
        self.ir.ret_void()
        with self.ir.goto_block(self.entry):
            self.ir.branch(self._start)

    def local(self, type_: ir.Type, value: ir.Value | None = None) -> ir.Value:
        """The address of a new local, set to `value` here."""
        with self.ir.goto_block(self.entry):
            slot = self.ir.alloca(type_)
        if value is not None:
            self.ir.store(value, slot)
        return slot

    def address(self, base: ir.Value, offset: ir.Value | int, element: ir.Type) -> ir.Value:
        return self.ir.gep(base, [offset if isinstance(offset, ir.Value) else i64(offset)], source_etype=element)

    def load(self, base: ir.Value, offset: ir.Value | int, element: ir.Type, lanes: int = 1) -> ir.Value:
        type_ = vector(element, lanes) if lanes > 1 else element
        value = self.ir.load(self.address(base, offset, element), typ=type_)
        value.align = _size(element)
        return value

    def store(self, value: ir.Value, base: ir.Value, offset: ir.Value | int, element: ir.Type) -> None:
        self.ir.store(value, self.address(base, offset, element), align=_size(element))

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

    def intrinsic(self, name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
        kind = ir.FunctionType(result, [operand.type for operand in operands])
        return self.ir.call(declare(self.module, name, kind), operands)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.intrinsic(f"llvm.fma.{_mangled(a.type)}", a.type, a, b, c)

    def minimum(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The smaller of two signed integers."""
        return self.ir.select(self.ir.icmp_signed("<", a, b), a, b)

    def broadcast(self, value: ir.Value, lanes: int) -> ir.Value:
        type_ = vector(value.type, lanes)
        single = self.ir.insert_element(ir.Constant(type_, ir.Undefined), value, ir.Constant(I32, 0))
        return self.ir.shuffle_vector(single, single, splat(vector(I32, lanes), 0))

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return self.ir.shuffle_vector(a, b, ir.Constant(vector(I32, len(lanes)), lanes))


def define(
    module: ir.Module, name: str, parameters: list[ir.Type], emit: Callable[..., None], *, public: bool = False
) -> ir.Function:
    """Adds the function `name` to `module`; `emit(body, *arguments)` writes it. No argument aliases another."""
    function = ir.Function(module, ir.FunctionType(VOID, parameters), name)
    if not public:
        function.linkage = "internal"
        function.attributes.add("noinline")
    for argument in function.args:
        if argument.type == PTR:
            argument.add_attribute("noalias")
    body = Body(function)
    emit(body, *function.args)
    body.finish()
    return function


def declare(module: ir.Module, name: str, kind: ir.FunctionType) -> ir.Function:
    """The external function or intrinsic `name`, declared once a module."""
    known = module.globals.get(name)
    return ir.Function(module, kind, name) if known is None else known


class Program:
    """A compiled module. It must outlive the addresses taken from it."""

    def __init__(self, module: ir.Module, symbols: dict[str, int]) -> None:
        for name, address in symbols.items():
            llvm.add_symbol(name, address)
        machine = _target_machine()
        module.triple = llvm.get_process_triple()
        module.data_layout = str(machine.target_data)
        compiled = llvm.parse_assembly(str(module))
        compiled.verify()
        options = llvm.create_pipeline_tuning_options(speed_level=3)
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(compiled, passes)
        self._engine = llvm.create_mcjit_compiler(compiled, machine)
        self._engine.finalize_object()
        self.assembly = machine.emit_assembly(compiled)

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True
    )


@cache
def openmp_symbols() -> dict[str, int]:
    """Addresses of the OpenMP functions that the torch in this process uses, so that both share one pool."""
    process = ctypes.CDLL(None)
    return {
        name: ctypes.cast(getattr(process, name), ctypes.c_void_p).value or 0
        for name in ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    }


def _size(element: ir.Type) -> int:
    return 4 if element == F32 else 2 if element == F16 else 8 if element == PTR else element.width // 8


def _mangled(type_: ir.Type) -> str:
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{_mangled(type_.element)}"
    return "f32" if type_ == F32 else "f16" if type_ == F16 else f"i{type_.width}"
