"""A stored bf16 weight row times a bf16 row: the microkernel of a decoding step, which reads memory as one long line.

Where the processor has `vdpbf16ps`, one instruction takes 32 weights as they lie in memory, and a core has time to spare
while it waits for them; elsewhere weights are widened to fp32. Measured against that on two cores: several rows at a time,
and fetching ahead by instruction, are both slower (22 to 25 GB/s for 29), because the processor's own fetching ahead
follows one line best.

Numba's cache looks at the file of a pass alone: after a change here, touch the passes that use it.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from moesaic.kernels.few_rows import host_has

LINE = 32
"""Columns per instruction; divides the columns."""

CHAINS = 4
"""Instructions under way at a time: each waits for the sum before it."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_SUMS, _PAIRS, _BYTES = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16), ir.IntType(8).as_pointer()


@intrinsic
def widen(context, bits):
    """bf16 bits to fp32: they are its upper half."""

    def code(context, builder, signature, arguments):
        high = builder.shl(builder.zext(arguments[0], _I32), _I32(16))
        return builder.bitcast(high, _F32)

    return types.float32(types.uint16), code


@numba.njit(fastmath=True, inline="always")
def _by_widening(weight_A, row_A):
    total = np.float32(0)
    for a in range(row_A.shape[0]):
        total += widen(weight_A[a]) * widen(row_A[a])
    return total


@intrinsic
def _by_pairs(context, weight_A, row_A):
    """The sum over columns in fp32, of two uint16 arrays that are contiguous."""

    def code(context, builder, signature, arguments):
        dot = builder.module.declare_intrinsic(
            "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
        )
        arrays = [
            context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True)
        ]
        starts = [builder.bitcast(array.data, _BYTES) for array in arrays]
        lines = builder.udiv(builder.extract_value(arrays[1].shape, 0), _I64(LINE))

        def product(total, line):
            offset = builder.mul(line, _I64(2 * LINE))
            weights, row = (
                builder.load(builder.bitcast(builder.gep(start, [offset]), _PAIRS.as_pointer()), align=2) for start in starts
            )
            return builder.call(dot, [total, row, weights])

        def loop(name, first, end, chains, totals):
            """`chains` lines a turn from line `first`, while whole turns fit before `end`: the next line, and the totals."""
            test, body, after = (builder.append_basic_block(name + part) for part in ("_test", "_body", "_end"))
            before = builder.block
            builder.branch(test)
            builder.position_at_end(test)
            line = builder.phi(_I64)
            carried = [builder.phi(_SUMS) for _ in totals]
            line.add_incoming(first, before)
            for phi, total in zip(carried, totals, strict=True):
                phi.add_incoming(total, before)
            builder.cbranch(builder.icmp_unsigned("<=", builder.add(line, _I64(chains)), end), body, after)
            builder.position_at_end(body)
            made = [product(carried[c], builder.add(line, _I64(c))) for c in range(chains)] + carried[chains:]
            line.add_incoming(builder.add(line, _I64(chains)), body)
            for phi, total in zip(carried, made, strict=True):
                phi.add_incoming(total, body)
            builder.branch(test)
            builder.position_at_end(after)
            return line, carried

        line, totals = loop("many", _I64(0), lines, CHAINS, [ir.Constant(_SUMS, [0.0] * 16)] * CHAINS)
        _, totals = loop("rest", line, lines, 1, totals)
        while len(totals) > 1:
            totals = [builder.fadd(left, right) for left, right in zip(totals[::2], totals[1::2], strict=True)]
        vector, lanes = totals[0], 16
        while lanes > 1:  # halves onto each other
            lanes //= 2
            halves = [ir.Constant(ir.VectorType(_I32, lanes), list(range(at, at + lanes))) for at in (0, lanes)]
            low, high = (builder.shuffle_vector(vector, vector, half) for half in halves)
            vector = builder.fadd(low, high)
        return builder.extract_element(vector, _I32(0))

    return types.float32(weight_A, row_A), code


row_dot = _by_pairs if host_has("avx512bf16") else _by_widening
