"""SS2D's core on the CPU as one pass in vector code: Δ, the recurrence and the merge in registers, no scanned copies.

A task is one image and as many channels as a vector register holds: its lanes. It walks the routes one after the other,
some steps at a time so that their exponentials overlap, and adds to the map. Gradients are those of the blocked scan.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vmamba.ops.llvm import F32, I16, I64, Code, Kernel, float_lanes, ir
from vmamba.ops.routes import get_routes, route_index, without_flip_back
from vmamba.ops.ss2d import chunked

_NUMBERS = (
    "tasks",
    "groups",
    "routes",
    "rank",
    "length",
    "channels",
    "columns",
    "sequences",
    "steps",
    "scratch_stride",
)
_ADDRESSES = ("x", "projected", "dt_weight", "dt_bias", "A", "D", "y", "result", "order", "back", "scratch")


def why_not(
    x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, routes: str, height: int = 0, width: int = 0
) -> str | None:
    """Say why this kernel cannot run on such inputs; None if it can."""
    if x.device.type != "cpu":
        return f"the CPU kernel needs tensors on the CPU, and x is on {x.device}."
    if x.dtype == torch.float64:
        return "the CPU kernel computes in float32, and x is float64."
    return None


class _Forward:
    """Writes the forward for N states a channel.

    Args:
        N: the states.
        ragged: whether the channels do not fill the last register.
        lanes: of a register.
        reads16: whether x and `projected` are bfloat16.
        gives16: whether the last route rounds its sums to the map `result` in bfloat16.
    """

    def __init__(self, N: int, ragged: bool, lanes: int, reads16: bool, gives16: bool) -> None:
        self.reads16, self.gives16 = reads16, gives16
        self.code = Code("ss2d_forward", (*_NUMBERS, *_ADDRESSES), lanes)
        self.N, self.ragged, self.lanes = N, ragged, lanes
        self.at_once = 8 if lanes == 16 else 4  # steps: what the registers hold
        self.number = {name: self.code.word(name) for name in _NUMBERS}
        self.pointer = {name: self.code.pointer(name) for name in _ADDRESSES}
        self.sums = [self.code.variable(self.code.vector) for _ in range(self.at_once)]
        self.state = self.code.variable(self.code.vector, N)

    def kernel(self) -> Kernel:
        """Write and compile."""
        b, number = self.code.build, self.number
        own = b.mul(self.code.worker(), number["scratch_stride"])
        self.weights = self.code.at(self.pointer["scratch"], own)  # [R + N, lanes]: Δ's weights, then A
        with self.code.tasks(number["tasks"]) as task:
            self.first_position = b.mul(b.sdiv(task, number["groups"]), number["length"])
            self.channel = b.mul(b.srem(task, number["groups"]), I64(self.lanes))
            left = b.sub(number["channels"], self.channel)
            self.mask = self.code.first_lanes(left) if self.ragged else None
            with self.code.loop(I64(0), number["routes"]) as route:
                self._route(route)
        return self.code.compile()

    def _route(self, route: ir.Value) -> None:
        b, code, number = self.code.build, self.code, self.number
        self.is_first = b.icmp_signed("==", route, I64(0))
        self.is_last = b.icmp_signed("==", b.add(route, I64(1)), number["routes"])
        of_route = b.mul(route, number["channels"])
        here = b.add(of_route, self.channel)
        last = b.sub(b.add(of_route, number["channels"]), I64(1))
        rank, N = number["rank"], I64(self.N)
        for name, rows, first_row in (("dt_weight", rank, I64(0)), ("A", N, rank)):
            with code.loop(I64(0), rows) as row:
                first = b.add(b.mul(here, rows), row)
                values = code.gather(self.pointer[name], first, rows, b.add(b.mul(last, rows), row))
                code.store_vector(values, self.weights, b.mul(b.add(first_row, row), I64(self.lanes)))
        self.bias = code.load_vector(self.pointer["dt_bias"], here, self.mask)
        self.skip = code.load_vector(self.pointer["D"], here, self.mask)
        self.first_column = b.mul(route, b.add(rank, I64(2 * self.N)))
        with code.loop(I64(0), number["sequences"]) as sequence:
            for n in range(self.N):
                b.store(code.splat(0.0), code.at(self.state, I64(n), code.vector))
            start = b.add(b.mul(route, number["length"]), b.mul(sequence, number["steps"]))
            end = b.add(start, number["steps"])
            whole = b.sub(end, b.srem(number["steps"], I64(self.at_once)))
            with code.loop(start, whole, self.at_once) as step:
                self._steps(step, self.at_once)
            with code.loop(whole, end) as step:
                self._steps(step, 1)

    def _steps(self, step: ir.Value, count: int) -> None:
        b, code, number = self.code.build, self.code, self.number
        steps = [b.add(step, I64(i)) for i in range(count)]
        read = [b.add(self.first_position, code.load(self.pointer["order"], s, I64)) for s in steps]
        kind = I16 if self.reads16 else F32
        firsts = [b.add(b.mul(p, number["columns"]), self.first_column) for p in read]
        rows = [code.at(self.pointer["projected"], first, kind) for first in firsts]
        for total in self.sums[:count]:
            b.store(self.bias, total)
        with code.loop(I64(0), number["rank"]) as r:
            weight = code.load_vector(self.weights, b.mul(r, I64(self.lanes)))
            for total, row in zip(self.sums, rows, strict=False):
                b.store(code.fma(weight, self._value(row, r), b.load(total, typ=code.vector)), total)
        dt = [code.softplus(b.load(total, typ=code.vector)) for total in self.sums[:count]]
        load = code.load_bfloat16_vector if self.reads16 else code.load_vector
        inputs = [load(self.pointer["x"], self._element(p), self.mask) for p in read]
        drives = [b.fmul(d, u) for d, u in zip(dt, inputs, strict=True)]
        for total, u in zip(self.sums, inputs, strict=False):
            b.store(b.fmul(self.skip, u), total)
        with code.loop(I64(0), I64(self.N)) as n:
            self._state(n, dt, drives, rows)
        for s, total in zip(steps, self.sums, strict=False):
            position = b.add(self.first_position, code.load(self.pointer["back"], s, I64))
            self._add_to_map(b.load(total, typ=code.vector), self._element(position))

    def _state(self, n: ir.Value, dt: Sequence[ir.Value], drives: Sequence[ir.Value], rows: Sequence[ir.Value]) -> None:
        b, code, number = self.code.build, self.code, self.number
        A = code.load_vector(self.weights, b.mul(b.add(number["rank"], n), I64(self.lanes)))
        decays = [code.exp(b.fmul(d, A)) for d in dt]
        place = code.at(self.state, n, code.vector)
        h = b.load(place, typ=code.vector)
        at_B = b.add(number["rank"], n)
        at_C = b.add(at_B, I64(self.N))
        for decay, drive, row, total in zip(decays, drives, rows, self.sums, strict=False):
            h = code.fma(decay, h, b.fmul(drive, self._value(row, at_B)))
            b.store(code.fma(h, self._value(row, at_C), b.load(total, typ=code.vector)), total)
        b.store(h, place)

    def _value(self, row: ir.Value, index: ir.Value) -> ir.Value:
        load = self.code.load_bfloat16 if self.reads16 else self.code.load
        return self.code.splat(load(row, index))

    def _element(self, position: ir.Value) -> ir.Value:
        b = self.code.build
        return b.add(b.mul(position, self.number["channels"]), self.channel)

    def _add_to_map(self, value: ir.Value, index: ir.Value) -> None:
        # The first route covers the map, so that it need not be cleared.
        code, y = self.code, self.pointer["y"]
        before = code.load_vector(y, index, self.mask)
        before = code.build.select(self.is_first, code.splat(0.0), before)
        total = code.build.fadd(before, value)
        if not self.gives16:
            code.store_vector(total, y, index, self.mask)
            return
        with code.build.if_else(self.is_last) as (then, otherwise):
            with then:
                code.store_bfloat16_vector(total, self.pointer["result"], index, self.mask)
            with otherwise:
                code.store_vector(total, y, index, self.mask)


@functools.cache
def forward_kernel(N: int, ragged: bool, lanes: int, reads16: bool = False, gives16: bool = False) -> Kernel:
    """Compile the forward, once a process; see `_Forward` for the arguments."""
    return _Forward(N, ragged, lanes, reads16, gives16).kernel()


@functools.lru_cache(128)
def _positions(routes: str, height: int, width: int, flip_back: bool) -> tuple[Tensor, Tensor]:
    """Tabulate the position that each route reads at each step, and the one it adds to: (K, L) int64 each."""
    pattern = get_routes(routes)
    back = pattern if flip_back else without_flip_back(pattern)
    order, added = (torch.stack([route_index(r, height, width, "cpu") for r in rs]) for rs in (pattern, back))
    return order, added


def forward(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    height: int,
    width: int,
    routes: str,
    flip_back: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Compute `ss2d_scan`."""
    # Here and below the device is named: the default one may be another, and the kernel takes addresses.
    y = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    reads16, gives16 = x.dtype == projected.dtype == torch.bfloat16, out_dtype == torch.bfloat16
    result = torch.empty(x.shape, dtype=torch.bfloat16, device="cpu") if gives16 else y
    if y.numel():
        K, E, N = A.shape
        R, lanes = dt_weight.shape[2], float_lanes()
        tensors = [(t if reads16 else t.float()).contiguous() for t in (x, projected)]
        tensors += [t.float().contiguous() for t in (dt_weight, dt_bias, A, D)]
        order, back = _positions(routes, height, width, flip_back)
        sequences, steps = get_routes(routes)[0].sequences(height, width)
        groups = -(-E // lanes)
        tasks = x.shape[0] * groups
        # All of torch's threads even if some have nothing to do: OpenMP runtimes end the threads a smaller team leaves.
        threads = torch.get_num_threads() if tasks > 1 else 1
        scratch = torch.empty(threads, R + N, lanes, dtype=torch.float32, device="cpu")
        numbers = (tasks, groups, K, R, x.shape[1], E, projected.shape[2], sequences, steps, (R + N) * lanes)
        kernel = forward_kernel(N, E % lanes != 0, lanes, reads16, gives16)
        kernel.run([*numbers, *tensors, y, result, order, back, scratch], threads)
    return result.to(out_dtype)


backward = chunked.backward
