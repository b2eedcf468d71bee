"""The CPU's own limit: loops of nothing but the arithmetic of a term, on vectors that stay in L1 cache.

LLVM prefers 256-bit vectors even on AVX-512 machines, and its own vectorisation of a sum keeps few additions
in flight. So the loops are written in LLVM's language, with the vector width spelled out and one accumulator
vector per pair of a small tile of rows. `instructions` reads back, from the disassembly, what they became.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from benchlib.timing import Elapsed

VECTORS = 32  # vectors per row: rows of at most 2 KiB, so a tile's rows fit in every L1 cache
TERMS_PER_SAMPLE = 1e8  # per thread, a few milliseconds
TRIALS = 7
TILES = {
    64: ((4, 4), (4, 3)),
    32: ((4, 2), (2, 3), (4, 1)),
    16: ((4, 2),),
}  # accumulators that fit in 32 or 16 registers
TILES_BOTH = {64: ((4, 2), (3, 3)), 32: ((2, 2), (2, 1)), 16: ((2, 2),)}  # the same, with two for each pair
SIGNS = 0xA9A9A888  # codes of VFIXUPIMM, by kind of number: NaN and 0 become 0, others 1 or -1


def vector_bytes() -> int:
    """Bytes of the widest floating-point vector this machine's processor has."""
    features = llvm.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx") else 16


class Lane:
    """Vector type of one candidate, and the few operations the loops need."""

    def __init__(self, dtype: str, nbytes: int) -> None:
        single = dtype == "float32"
        self.nbytes, self.count = nbytes, nbytes // (4 if single else 8)
        self.type = ir.VectorType(ir.FloatType() if single else ir.DoubleType(), self.count)
        self.fabs_name = f"llvm.fabs.v{self.count}{'f32' if single else 'f64'}"
        self.zero = ir.Constant(self.type, None)

    def fabs(self, builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """|value|, which becomes one AND with a constant."""
        signature = ir.FunctionType(self.type, [self.type])
        fabs = cgutils.get_or_insert_function(builder.module, signature, self.fabs_name)
        return builder.call(fabs, [value])

    def load(self, builder: ir.IRBuilder, base: ir.Value, row: int, column: ir.Value) -> ir.Value:
        """Vector `column` of row `row`; rows are VECTORS vectors long."""
        first = ir.Constant(column.type, row * VECTORS)
        value = builder.load(builder.gep(base, [builder.add(first, column)]))
        value.align = self.nbytes
        return value

    def call(self, builder: ir.IRBuilder, name: str, arguments: list[ir.Value]) -> ir.Value:
        """LLVM's function of that name, whose result is a vector."""
        signature = ir.FunctionType(self.type, [argument.type for argument in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)

    def sign(self, builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
        """1, -1 or 0, by one instruction with AVX-512."""
        suffix = self.fabs_name.removeprefix("llvm.fabs.")
        if self.nbytes < 64:
            signed = self.call(builder, f"llvm.copysign.{suffix}", [ir.Constant(self.type, [1.0] * self.count), value])
            return builder.select(builder.fcmp_ordered("!=", value, self.zero), signed, self.zero)
        codes = ir.VectorType(ir.IntType(512 // self.count), self.count)
        number, every_lane = ir.IntType(32), ir.IntType(self.count)(-1)
        arguments = [value, value, ir.Constant(codes, [SIGNS] * self.count), number(0), every_lane, number(4)]
        return self.call(builder, f"llvm.x86.avx512.mask.fixupimm.p{'s' if self.count == 16 else 'd'}.512", arguments)

    def multiply_add(self, builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c"""
        return self.call(builder, self.fabs_name.replace("fabs", "fmuladd"), [a, b, c])


def forward_term(builder: ir.IRBuilder, lane: Lane, accs: list[ir.Value], operands: list[ir.Value]) -> list[ir.Value]:
    """acc + |q - k|"""
    q, k, _ = operands
    return [builder.fadd(accs[0], lane.fabs(builder, builder.fsub(q, k)))]


def multiplied_term(
    builder: ir.IRBuilder, lane: Lane, accs: list[ir.Value], operands: list[ir.Value]
) -> list[ir.Value]:
    """acc + |q - k| * 1: an addition by a fused multiply-add, for which some processors have units of their own."""
    q, k, one = operands
    return [lane.multiply_add(builder, lane.fabs(builder, builder.fsub(q, k)), one, accs[0])]


def both_terms(builder: ir.IRBuilder, lane: Lane, accs: list[ir.Value], operands: list[ir.Value]) -> list[ir.Value]:
    """A term of either gradient, with one sign for both: acc + h * sign, acc' - h * sign."""
    q, k, h = operands
    sign = lane.sign(builder, builder.fsub(q, k))
    return [
        lane.multiply_add(builder, sign, h, accs[0]),
        lane.multiply_add(builder, builder.fneg(sign), h, accs[1]),
    ]


def backward_term(builder: ir.IRBuilder, lane: Lane, accs: list[ir.Value], operands: list[ir.Value]) -> list[ir.Value]:
    """acc + h where q > k, acc - h where q < k: masked additions with AVX-512, else h or 0 by the mask."""
    (q, k, h), (acc,) = operands, accs
    more, less = builder.fcmp_ordered(">", q, k), builder.fcmp_ordered("<", q, k)
    if lane.nbytes == 64:
        acc = builder.select(more, builder.fadd(acc, h), acc)
        return [builder.select(less, builder.fsub(acc, h), acc)]
    acc = builder.fadd(acc, builder.select(more, h, lane.zero))
    return [builder.fsub(acc, builder.select(less, h, lane.zero))]


TERMS = {  # and how many it is
    "forward": (forward_term, 1),
    "multiplied": (multiplied_term, 1),
    "backward": (backward_term, 1),
    "both": (both_terms, 2),
}


class Tile:
    """The loop in LLVM's language: every pair of a few rows of q and of k, vector by vector."""

    def __init__(self, op: str, lane: Lane, rows_q: int, rows_k: int) -> None:
        (self.term, self.sums), self.lane, self.rows_q, self.rows_k = TERMS[op], lane, rows_q, rows_k

    def emit(self, builder: ir.IRBuilder, pointers: list[ir.Value], count: ir.Value) -> None:
        """`pointers` to q, k, h and out; accumulators of their own for each pair, `count` vectors per row."""
        lane, int_type = self.lane, count.type
        q, k, h, out = (builder.bitcast(pointer, lane.type.as_pointer()) for pointer in pointers)
        pairs = self.rows_q * self.rows_k
        accs = [[cgutils.alloca_once_value(builder, lane.zero) for _ in range(self.sums)] for _ in range(pairs)]
        rows_h = 1 if self.term is multiplied_term else self.rows_q
        weights = [lane.load(builder, h, row, ir.Constant(int_type, 0)) for row in range(rows_h)]
        with cgutils.for_range(builder, count) as loop:
            q_rows = [lane.load(builder, q, row, loop.index) for row in range(self.rows_q)]
            k_rows = [lane.load(builder, k, row, loop.index) for row in range(self.rows_k)]
            for pair, acc in enumerate(accs):
                i, j = divmod(pair, self.rows_k)
                operands = [q_rows[i], k_rows[j], weights[i % rows_h]]
                results = self.term(builder, lane, [builder.load(place) for place in acc], operands)
                for place, result in zip(acc, results, strict=True):
                    builder.store(result, place)
        for pair, acc in enumerate(place for places in accs for place in places):
            place = builder.gep(out, [ir.Constant(int_type, pair)])
            builder.store(builder.load(acc), place).align = lane.nbytes


def compile_loop(tile: Tile) -> Any:
    """`run(q, k, h, out, count, passes)`, compiled on its first call; it runs without the GIL."""

    @intrinsic
    def one_pass(typingctx, q, k, h, out, count):
        def codegen(context, builder, signature, args):
            typed = zip(signature.args[:4], args[:4], strict=True)
            arrays = [context.make_array(kind)(context, builder, array) for kind, array in typed]
            tile.emit(builder, [array.data for array in arrays], args[4])
            return context.get_dummy_value()

        return types.void(q, k, h, out, count), codegen

    @njit(nogil=True)
    def run(q, k, h, out, count, passes):
        for _ in range(passes):
            one_pass(q, k, h, out, count)

    return run


def aligned(count: int, dtype: str) -> np.ndarray:
    """`count` normal numbers, starting on a 64-byte boundary."""
    raw = np.random.default_rng(0).standard_normal(count + 64).astype(dtype)
    start = (-raw.ctypes.data % 64) // raw.itemsize
    return raw[start : start + count]


class Loop:
    """One candidate: a vector width and a tile, compiled, with its own buffers for every thread."""

    def __init__(self, op: str, dtype: str, nbytes: int, rows: tuple[int, int], threads: int) -> None:
        lane = Lane(dtype, nbytes)
        rows_q, rows_k = rows
        row = VECTORS * lane.count
        self.run = compile_loop(Tile(op, lane, rows_q, rows_k))
        how = {"both": ", both gradients at once", "multiplied": ", sums by multiply-adds"}.get(op, "")
        self.description = f"{lane.count} x {dtype} vectors, {rows_q} x {rows_k} pairs{how}"
        sums = TERMS[op][1]
        sizes = (rows_q * row, rows_k * row, rows_q * row, sums * rows_q * rows_k * lane.count)
        self.buffers = [[aligned(size, dtype) for size in sizes] for _ in range(threads)]
        if op == "multiplied":
            for _, _, ones, _ in self.buffers:
                ones[:] = 1
        self.pool = ThreadPoolExecutor(threads)
        self.passes = max(1, int(TERMS_PER_SAMPLE / (sums * rows_q * rows_k * row)))
        self.terms = self.passes * sums * rows_q * rows_k * row
        self.run(*self.buffers[0], VECTORS, 1)

    def _timed(self, buffers: list[np.ndarray], core: int) -> tuple[float, float, float]:
        """(start, end, seconds this thread had of a core), on ``core``: two short samples may share one otherwise."""
        if core >= 0:
            os.sched_setaffinity(0, {core})  # of this thread alone
        start, used = time.perf_counter(), time.thread_time()
        self.run(*buffers, VECTORS, self.passes)
        return start, time.perf_counter(), time.thread_time() - used

    def sample(self) -> Elapsed:
        """Seconds of 1e9 terms by all threads together: from first start to last end, and of core time."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        spans = list(self.pool.map(self._timed, self.buffers, [*cores, *[-1] * len(self.buffers)]))
        wall = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
        share = 1e9 / (len(spans) * self.terms)
        return Elapsed(wall * share, sum(used for *_, used in spans) * share)

    def instructions(self) -> Counter[str]:
        """Mnemonics of the innermost loop, from the disassembly (x86 only; empty elsewhere)."""
        (assembly,) = self.run.inspect_asm().values()
        best: Counter[str] = Counter()
        for match in re.finditer(r"^(\.LBB\w+):\n((?:(?!^\.LBB).*\n)*?)\s+j\w+\s+\1\b", assembly, re.M):
            found = Counter(re.findall(r"^\t([a-z]\w*)", match[2], re.M))
            if sum(found.values()) > sum(best.values()):
                best = found
        return best


class CpuLimit:
    """The fastest of the candidate loops of one op and dtype on `threads` threads.

    The choice goes by core time, which other processes do not disturb. `sample` measures it again: called
    between the peers, it meets the same clock and the same neighbours.
    """

    def __init__(self, op: str, dtype: str, threads: int) -> None:
        summed_in = "float64" if dtype == "float64" else "float32"
        widest = vector_bytes()
        widths = list(dict.fromkeys((widest, max(16, widest // 2))))
        other, tiles = ("both", TILES_BOTH) if op == "backward" else ("multiplied", TILES)
        loops = [
            Loop(kind, summed_in, nbytes, rows, threads)
            for kind, rows_of in ((op, TILES), (other, tiles))
            for nbytes in widths
            for rows in rows_of[nbytes]
        ]
        trials = [[loop.sample().core for loop in loops] for _ in range(TRIALS)]
        best = [min(times) for times in zip(*trials, strict=True)]
        self.loop, self.threads = loops[best.index(min(best))], threads

    def sample(self) -> Elapsed:
        """Seconds of 1e9 terms by all threads together."""
        return self.loop.sample()

    def describe(self) -> str:
        """Rate per core time, vector width, tile, and the instructions of the innermost loop."""
        counts = ", ".join(f"{n} {name}" for name, n in self.loop.instructions().most_common())
        alone = self.threads / min(self.sample().core for _ in range(TRIALS))
        alone_text = f"{alone:.1f} by core time (no other process)"
        return f"{alone_text}; {self.loop.description}; {counts or 'no disassembly on this machine'}"
