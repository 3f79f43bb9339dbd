"""A matrix of codes (8, 4 or 2 bits) as bf16, at the speed it can be written to the cache; see kernels/quantized.py.

32 weights a turn. In 4 and 2 bits the group's levels times its scale are a table of bf16, and one instruction (`vpermw`)
looks 32 codes up; a byte is brought under every code it holds by shifts, and the table repeats, so that nothing is masked.
"""

from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

COLUMNS = 32
"""Weights a turn; divides the columns."""

_I16, _I32, _I64, _BYTES = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_WORDS, _INTS, _SUMS = ir.VectorType(_I16, 32), ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)


@intrinsic
def _row(context, bits, codes, scale, turns, shift, out):
    """One row: the addresses of its codes, scales and result; turn t belongs to group t >> shift."""

    def code(context, builder, signature, arguments):
        end = builder.append_basic_block("end")
        choice = builder.switch(arguments[0], end)
        for width in (8, 4, 2):
            block = builder.append_basic_block(f"int{width}")
            choice.add_case(_I64(width), block)
            builder.position_at_end(block)
            _turns(builder, width, arguments[1:], end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), code


def _turns(builder, bits, arguments, end):
    codes, scale, turns, shift, out = arguments
    declare = builder.module.declare_intrinsic
    narrow = declare("llvm.x86.avx512bf16.cvtne2ps2bf16.512", (), ir.FunctionType(_WORDS, [_SUMS, _SUMS]))
    look_up = declare("llvm.x86.avx512.permvar.hi.512", (), ir.FunctionType(_WORDS, [_WORDS, _WORDS]))
    codes, scale, out = (builder.inttoptr(address, _BYTES) for address in (codes, scale, out))
    before, loop = builder.block, builder.append_basic_block("turns")
    builder.branch(loop)
    builder.position_at_end(loop)
    turn = builder.phi(_I64)
    turn.add_incoming(_I64(0), before)

    def load(kind, start, offset):
        return builder.load(builder.bitcast(builder.gep(start, [offset]), kind.as_pointer()), align=1)

    def everywhere(kind, value):
        nothing = ir.Constant(kind, ir.Undefined)
        return builder.shuffle_vector(
            builder.insert_element(nothing, value, _I32(0)),
            nothing,
            ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count),
        )

    held = load(_I16, scale, builder.mul(builder.lshr(turn, shift), _I64(2)))
    factor = everywhere(_SUMS, builder.bitcast(builder.shl(builder.zext(held, _I32), _I32(16)), ir.FloatType()))
    at = builder.mul(turn, _I64(COLUMNS * bits // 8))
    if bits == 8:
        halves = []
        for half in range(2):
            wide = builder.zext(load(ir.VectorType(ir.IntType(8), 16), codes, builder.add(at, _I64(16 * half))), _INTS)
            levels = builder.sitofp(builder.sub(wide, ir.Constant(_INTS, [128] * 16)), _SUMS)
            halves.append(builder.fmul(levels, factor))
        made = builder.call(narrow, halves[::-1])  # the high half comes first
    else:
        levels = [float(level) for level in range(-8, 8)] if bits == 4 else [-3.0, -1.0, 1.0, 3.0] * 4
        scaled = builder.fmul(ir.Constant(_SUMS, levels), factor)
        lane, shifts = (_I32, (12,)) if bits == 4 else (_I64, (14, 28, 42))
        count = COLUMNS * bits // 8
        kind = ir.VectorType(lane, count)
        wide = builder.zext(load(ir.VectorType(ir.IntType(8), count), codes, at), kind)
        index = wide
        for by in shifts:
            index = builder.or_(index, builder.shl(wide, ir.Constant(kind, [by] * count)))
        made = builder.call(look_up, [builder.call(narrow, [scaled, scaled]), builder.bitcast(index, _WORDS)])
    builder.store(made, builder.bitcast(builder.gep(out, [builder.mul(turn, _I64(2 * COLUMNS))]), _WORDS.as_pointer()), align=2)
    following = builder.add(turn, _I64(1))
    turn.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, turns), loop, end)


@numba.njit(parallel=True, error_model="numpy", cache=True)
def widen(matrices_N7, parts):
    """Rows of `matrices_N7`: addresses of codes, scales and result (bf16, contiguous), rows, columns, bits, group size."""
    for part in numba.prange(parts):
        for n in range(matrices_N7.shape[0]):
            codes, scale, out, rows, columns, bits, size = matrices_N7[n]
            shift = 0 if size == 32 else 1 if size == 64 else 2
            groups = -(-columns // size)
            for row in range(rows * part // parts, rows * (part + 1) // parts):
                at = codes + row * (columns * bits // 8), scale + row * groups * 2, out + row * columns * 2
                _row(bits, at[0], at[1], columns // COLUMNS, shift, at[2])
