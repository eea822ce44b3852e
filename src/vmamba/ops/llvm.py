"""Vector code for the processor at hand: LLVM through llvmlite (no compiler to install), run on torch's own threads.

A kernel is one function that takes a table of 64-bit words (sizes, and addresses of tensors) and works on tasks until
none is left. Functions are written with llvmlite's builder and compiled once a process, in a tenth of a second.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

try:
    import llvmlite
    import llvmlite.binding as llvm
    from llvmlite import ir
except (ImportError, OSError) as error:  # OSError: installed, but its library does not load
    raise ImportError(f"it needs llvmlite, which `pip install 'vmamba[cpu]'` brings: {error}") from error

_OLDEST = (0, 46)


def _check_version(version: str) -> None:
    """Raise ImportError for an llvmlite that something else brought along and that writes another language."""
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise ImportError(f"llvmlite {version} is older than {'.'.join(map(str, _OLDEST))}, which this needs")


_check_version(llvmlite.__version__)
log = logging.getLogger(__name__)

F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
POINTER = ir.PointerType()
_NEXT_TASK, _NEXT_WORKER = 0, 1  # the first words of a table are counters
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lock = threading.RLock()


def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=cpu, features=features, opt=3)


@functools.cache
def float_lanes() -> int:
    """Return how many float32 a vector register of this processor holds."""
    features = llvm.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx") else 4


class Code:
    """What the kernels here write: float32 vectors of `lanes`, 64-bit indices, loops.

    Loop-carried values live in `variable`s, which LLVM turns into registers.
    """

    def __init__(self, name: str, parameters: Sequence[str], lanes: int) -> None:
        self.module = ir.Module(name)
        self.lanes, self.vector = lanes, ir.VectorType(F32, lanes)
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        self.entry = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.build = ir.IRBuilder(self.function.append_basic_block("body"))
        self._table = self.function.args[0]
        self._words = {name: 2 + i for i, name in enumerate(parameters)}

    def word(self, name: str) -> ir.Value:
        """Read a parameter that is a number."""
        return self.entry.load(self.entry.gep(self._table, [I64(self._words[name])], source_etype=I64), typ=I64)

    def pointer(self, name: str) -> ir.Value:
        """Read a parameter that is an address."""
        return self.entry.inttoptr(self.word(name), POINTER)

    def variable(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Reserve room for values that change."""
        return self.entry.alloca(kind, count)

    def _count_up(self, word: int) -> ir.Value:
        place = self.build.gep(self._table, [I64(word)], source_etype=I64)
        return self.build.atomic_rmw("add", place, I64(1), "monotonic")

    def worker(self) -> ir.Value:
        """Number this thread among those that work on the table."""
        return self._count_up(_NEXT_WORKER)

    @contextmanager
    def tasks(self, count: ir.Value) -> Iterator[ir.Value]:
        """Write what is done for each task that this thread gets hold of."""
        take, work, done = (self.function.append_basic_block(name) for name in ("take", "work", "done"))
        self.build.branch(take)
        self.build.position_at_end(take)
        task = self._count_up(_NEXT_TASK)
        self.build.cbranch(self.build.icmp_signed("<", task, count), work, done)
        self.build.position_at_end(work)
        yield task
        self.build.branch(take)
        self.build.position_at_end(done)

    @contextmanager
    def loop(self, start: ir.Value, stop: ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """Write the body of a loop over start, start + step, … < stop."""
        counter = self.variable(I64)
        self.build.store(start, counter)
        check, body, after = (self.function.append_basic_block(name) for name in ("check", "loop", "after"))
        self.build.branch(check)
        self.build.position_at_end(check)
        index = self.build.load(counter, typ=I64)
        self.build.cbranch(self.build.icmp_signed("<", index, stop), body, after)
        self.build.position_at_end(body)
        yield index
        self.build.store(self.build.add(index, I64(step)), counter)
        self.build.branch(check)
        self.build.position_at_end(after)

    def at(self, base: ir.Value, index: ir.Value, kind: ir.Type = F32) -> ir.Value:
        """Give the address of an element."""
        return self.build.gep(base, [index], source_etype=kind)

    def load(self, base: ir.Value, index: ir.Value, kind: ir.Type = F32) -> ir.Value:
        """Read a scalar element."""
        return self.build.load(self.at(base, index, kind), typ=kind)

    def load_vector(self, base: ir.Value, index: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """Read the elements from an index on; zero in lanes that are masked out."""
        place = self.at(base, index)
        if mask is None:
            return self.build.load(place, align=4, typ=self.vector)
        kinds = [POINTER, I32, mask.type, self.vector]
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        function = self._declare(name, self.vector, kinds)
        return self.build.call(function, [place, I32(4), mask, self.splat(0.0)])

    def store_vector(self, value: ir.Value, base: ir.Value, index: ir.Value, mask: ir.Value | None = None) -> None:
        """Write the elements from an index on, but for lanes that are masked out."""
        place = self.at(base, index)
        if mask is None:
            self.build.store(value, place, align=4)
            return
        function = self._declare(
            f"llvm.masked.store.v{self.lanes}f32.p0", ir.VoidType(), [self.vector, POINTER, I32, mask.type]
        )
        self.build.call(function, [value, place, I32(4), mask])

    def load_bfloat16(self, base: ir.Value, index: ir.Value) -> ir.Value:
        """Read a scalar element in bfloat16, which is the upper half of a float32."""
        return self._widen(self.load(base, index, I16), I32, F32)

    def load_bfloat16_vector(self, base: ir.Value, index: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        """Read elements in bfloat16 from an index on; zero in lanes that are masked out."""
        halves, words = ir.VectorType(I16, self.lanes), ir.VectorType(I32, self.lanes)
        place = self.at(base, index, I16)
        if mask is None:
            return self._widen(self.build.load(place, align=2, typ=halves), words, self.vector)
        name = f"llvm.masked.load.v{self.lanes}i16.p0"
        function = self._declare(name, halves, [POINTER, I32, mask.type, halves])
        zeros = ir.Constant(halves, [I16(0)] * self.lanes)
        return self._widen(self.build.call(function, [place, I32(2), mask, zeros]), words, self.vector)

    def _widen(self, halves: ir.Value, words: ir.Type, floats: ir.Type) -> ir.Value:
        sixteen = ir.Constant(words, [I32(16)] * self.lanes) if isinstance(words, ir.VectorType) else I32(16)
        return self.build.bitcast(self.build.shl(self.build.zext(halves, words), sixteen), floats)

    def store_bfloat16_vector(
        self, value: ir.Value, base: ir.Value, index: ir.Value, mask: ir.Value | None = None
    ) -> None:
        """Round to bfloat16, to the nearest and even, and write from an index on, but for lanes masked out."""
        b, halves, words = self.build, ir.VectorType(I16, self.lanes), ir.VectorType(I32, self.lanes)

        def every(number: int) -> ir.Constant:
            return ir.Constant(words, [I32(number)] * self.lanes)

        bits = b.bitcast(value, words)
        odd = b.and_(b.lshr(bits, every(16)), every(1))
        rounded = b.lshr(b.add(bits, b.add(odd, every(0x7FFF))), every(16))
        # Adding could carry a NaN's bits over into the sign.
        rounded = b.select(b.fcmp_unordered("uno", value, value), every(0x7FC0), rounded)
        result, place = b.trunc(rounded, halves), self.at(base, index, I16)
        if mask is None:
            b.store(result, place, align=2)
            return
        name = f"llvm.masked.store.v{self.lanes}i16.p0"
        function = self._declare(name, ir.VoidType(), [halves, POINTER, I32, mask.type])
        b.call(function, [result, place, I32(2), mask])

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """Make the mask of the first `count` lanes."""
        wide = ir.VectorType(I64, self.lanes)
        numbers = ir.Constant(wide, [I64(i) for i in range(self.lanes)])
        return self.build.icmp_signed("<", numbers, self._spread(count, wide))

    def splat(self, value: ir.Value | float) -> ir.Value:
        """Repeat a scalar in every lane."""
        if isinstance(value, float):
            return ir.Constant(self.vector, [ir.Constant(F32, value)] * self.lanes)
        return self._spread(value, self.vector)

    def _spread(self, value: ir.Value, kind: ir.VectorType) -> ir.Value:
        first = self.build.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [I32(0)] * self.lanes)
        return self.build.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def gather(self, base: ir.Value, first: ir.Value, step: ir.Value, last: ir.Value) -> ir.Value:
        """Read elements `step` apart; none beyond `last`, which then repeats."""
        result: ir.Value = ir.Constant(self.vector, ir.Undefined)
        for lane in range(self.lanes):
            index = self.build.add(first, self.build.mul(step, I64(lane)))
            index = self.build.select(self.build.icmp_signed("<", index, last), index, last)
            result = self.build.insert_element(result, self.load(base, index), I32(lane))
        return result

    def _declare(self, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> ir.Function:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Compute a·b + c, rounded once."""
        function = self._declare(f"llvm.fma.v{self.lanes}f32", self.vector, [self.vector] * 3)
        return self.build.call(function, [a, b, c])

    def clamp_below(self, x: ir.Value, low: float) -> ir.Value:
        """Raise what is less than `low` to it; a NaN stays one."""
        return self.build.select(self.build.fcmp_ordered("<", x, self.splat(low)), self.splat(low), x)

    def clamp_above(self, x: ir.Value, high: float) -> ir.Value:
        """Lower what is greater than `high` to it; a NaN stays one."""
        return self.build.select(self.build.fcmp_ordered(">", x, self.splat(high)), self.splat(high), x)

    def polynomial(self, x: ir.Value, coefficients: Sequence[float]) -> ir.Value:
        """Evaluate Σ c_i x^i, the highest power first inside."""
        result = self.splat(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            result = self.fma(result, x, self.splat(c))
        return result

    def exp(self, x: ir.Value) -> ir.Value:
        """Compute e^x within two units in the last place; what underflows is about 1e-38, what overflows infinite."""
        x = self.clamp_above(self.clamp_below(x, _EXP_LOW), _EXP_HIGH)
        shifted = self.fma(x, self.splat(_LOG2_E), self.splat(_ROUNDER))
        n = self.build.fsub(shifted, self.splat(_ROUNDER))
        f = self.fma(n, self.splat(-_LN2_HIGH), x)
        f = self.fma(n, self.splat(-_LN2_LOW), f)
        power = self.polynomial(f, (1.0, 1.0, *_EXP))
        # The whole number n is in the low bits of `shifted`: 2^n takes two additions of integers.
        whole = ir.VectorType(I32, self.lanes)
        bits = self.build.shl(self.build.bitcast(shifted, whole), ir.Constant(whole, [I32(23)] * self.lanes))
        bits = self.build.add(bits, ir.Constant(whole, [I32(0x3F800000)] * self.lanes))
        return self.build.fmul(power, self.build.bitcast(bits, self.vector))

    def softplus(self, x: ir.Value) -> ir.Value:
        """Compute log(1 + e^x) = max(x, 0) + log1p(e^-|x|) within three units in the last place."""
        negative = self.build.fcmp_ordered("<", x, self.splat(0.0))
        minus_x = self.build.fneg(x)
        u = self.exp(self.build.select(negative, x, minus_x))
        log1p = self.build.fmul(u, self.polynomial(u, (1.0, *_LOG1P)))
        return self.build.fadd(self.build.select(negative, self.splat(0.0), x), log1p)

    def compile(self) -> Kernel:
        """Finish the function and turn it into machine code."""
        self.build.ret_void()
        self.entry.branch(self.function.basic_blocks[1])
        return Kernel(str(self.module), self.function.name)


# Of least greatest relative error, below 4e-8: e^f = 1 + f + f²(…) for |f| ≤ ln 2 / 2, log1p(u) = u + u²(…) on [0, 1].
_EXP = (0.49999994, 0.16666518, 0.041668423, 0.008369064, 0.001381388)
_LOG1P = (
    -0.49999648332595825,
    0.3332132399082184,
    -0.24857163429260254,
    0.191536545753479,
    -0.13753803074359894,
    0.07920453697443008,
    -0.03006579354405403,
    0.005364824552088976,
)
_EXP_LOW, _EXP_HIGH = -87.0, 88.9  # where 2^n is still a normal number, and beyond the largest float32
_LOG2_E = 1.4426950216293335
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860676533018e-06  # ln 2 = high + low, n·high exact
_ROUNDER = 12582912.0  # 1.5·2²³: adding it rounds to whole numbers


class Kernel:
    """Machine code of one function, and how to run it."""

    def __init__(self, text: str, name: str) -> None:
        start = time.perf_counter()
        with _lock:  # LLVM is used by one thread at a time
            module = llvm.parse_assembly(text)
            module.verify()
            machine = _machine()
            tuning = llvm.create_pipeline_tuning_options(speed_level=3)
            # Written as vectors and unrolled by hand: what these passes add is compile time and spilled registers.
            tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
            passes = llvm.create_pass_builder(machine, tuning)
            passes.getModulePassManager().run(module, passes)
            self.assembly: str = machine.emit_assembly(module)
            # The engine owns the code, and from now on the machine: it has to live as long as the function.
            self._engine = llvm.create_mcjit_compiler(module, machine)
            self._engine.finalize_object()
            self._function = _FUNCTION(self._engine.get_function_address(name))
        seconds = time.perf_counter() - start
        log.log(
            logging.INFO if seconds > 2 else logging.DEBUG,
            "compiled %s for %s in %.2f s",
            name,
            llvm.get_host_cpu_name(),
            seconds,
        )

    def run(self, words: Sequence[int | Tensor], threads: int) -> None:
        """Work on all tasks with so many threads; `words` are the parameters, tensors standing for their addresses."""
        values = [word.data_ptr() if isinstance(word, Tensor) else word for word in words]
        table = (ctypes.c_int64 * (2 + len(values)))(0, 0, *values)
        _parallel(self._function, ctypes.addressof(table), threads)


@functools.cache
def _openmp_parallel() -> Callable[..., None] | None:
    """Find the entry of the OpenMP runtime that torch itself runs on, among what its library depends on."""
    try:
        entry = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.argtypes = [_FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    entry.restype = None
    return entry


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="vmamba")


def _parallel(function: Callable[[int], None], table: int, threads: int) -> None:
    """Call a function on several threads at once.

    Torch's own threads where they can be reached: others would compete with them for the cores, as they spin for a
    while after each operation. Elsewhere (OpenMP runtimes without GNU's entry point) a pool of this process.
    """
    if threads == 1:
        function(table)
        return
    openmp = _openmp_parallel()
    if openmp is not None:
        openmp(function, table, threads, 0)
        return
    pool = _pool(os.getpid(), threads - 1)
    helpers = [pool.submit(function, table) for _ in range(threads - 1)]
    function(table)
    for helper in helpers:
        helper.result()
