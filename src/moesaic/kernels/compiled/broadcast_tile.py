"""Eight packed rows times 32 columns, in registers: the microkernel of the backward pass (compiled/back.py).

There the contraction runs along the weights' other axis, so that it is a row's value that goes into every lane, and 32
columns that fill two vectors. Rows are packed as for compiled/tile.py (4 columns of each of 8 rows, then the next 4), the
other operand as pairs: both rows 2k and 2k + 1 of a column side by side, as `vdpbf16ps` adds them.

Numba's cache looks at the file of a pass alone: after a change here or in many.py, touch back.py.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

COLUMNS = 32
"""Columns that one tile takes: a cache line of a row in bf16."""

_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_SUMS, _PAIRS, _LINE = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I32, 16), ir.VectorType(ir.IntType(16), 32)


def _start(context, builder, kind, value):
    return builder.bitcast(context.make_array(kind)(context, builder, value).data, _BYTES)


def _at(builder, start, offset, kind):
    return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())


def _pick(builder, left, right, lanes):
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _products(builder, rows, pairs, quads):
    """The loop over 4 * `quads` of the rows' columns: accumulators [8 rows][2 halves of the columns]."""
    dot = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS])
    )
    before, loop, after = builder.block, builder.append_basic_block("quads"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    quad = builder.phi(_I64)
    quad.add_incoming(_I64(0), before)
    phis = [builder.phi(_SUMS) for _ in range(16)]
    sums = list(phis)
    in_rows, in_pairs = builder.mul(quad, _I64(64)), builder.mul(quad, _I64(256))
    nothing = ir.Constant(_PAIRS, ir.Undefined)
    for pair in range(2):
        halves = [
            builder.load(_at(builder, pairs, builder.add(in_pairs, _I64(128 * pair + 64 * half)), _PAIRS), align=4)
            for half in range(2)
        ]
        for row in range(8):
            value = builder.load(_at(builder, rows, builder.add(in_rows, _I64(8 * row + 4 * pair)), _I32), align=4)
            spread = _pick(builder, builder.insert_element(nothing, value, _I32(0)), nothing, [0] * 16)
            for half, columns in enumerate(halves):
                sums[2 * row + half] = builder.call(dot, [sums[2 * row + half], spread, columns])
    following = builder.add(quad, _I64(1))
    quad.add_incoming(following, loop)
    for phi, total in zip(phis, sums, strict=True):
        phi.add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, quads), loop, after)
    builder.position_at_end(after)
    return sums


@intrinsic
def sums_of_tile(context, rows_A, row_at, pairs_A, pair_at, quads, out_256):
    """out [8 rows, 32 columns] in fp32; rows and pairs begin at the given elements."""

    def code(context, builder, signature, arguments):
        rows, pairs, out = (_start(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 5))
        rows = builder.gep(rows, [builder.mul(arguments[1], _I64(2))])
        pairs = builder.gep(pairs, [builder.mul(arguments[3], _I64(4))])
        for i, total in enumerate(_products(builder, rows, pairs, arguments[4])):
            builder.store(total, _at(builder, out, _I64(64 * i), _SUMS), align=4)
        return context.get_dummy_value()

    return types.void(rows_A, types.intp, pairs_A, types.intp, types.intp, out_256), code


@intrinsic
def write_tile(context, rows_A, row_at, pairs_A, pair_at, quads, out_A, out_at, out_step):
    """The tile in bf16, written past the cache into `out`, whose rows are `out_step` elements apart, in whole lines."""

    def code(context, builder, signature, arguments):
        rows, pairs, out = (_start(context, builder, signature.args[i], arguments[i]) for i in (0, 2, 5))
        rows = builder.gep(rows, [builder.mul(arguments[1], _I64(2))])
        pairs = builder.gep(pairs, [builder.mul(arguments[3], _I64(4))])
        narrow = builder.module.declare_intrinsic(
            "llvm.x86.avx512bf16.cvtne2ps2bf16.512", (), ir.FunctionType(_LINE, [_SUMS, _SUMS])
        )
        past = builder.module.add_metadata([_I32(1)])
        sums = _products(builder, rows, pairs, arguments[4])
        for row in range(8):
            line = builder.call(narrow, [sums[2 * row + 1], sums[2 * row]])  # the high half comes first
            offset = builder.mul(builder.add(arguments[6], builder.mul(arguments[7], _I64(row))), _I64(2))
            stored = builder.store(line, _at(builder, out, offset, _LINE), align=64)
            stored.set_metadata("nontemporal", past)
        return context.get_dummy_value()

    kinds = rows_A, types.intp, pairs_A, types.intp, types.intp, out_A, types.intp, types.intp
    return types.void(*kinds), code


@intrinsic
def pair_lines(context, from_A, low_at, high_at, ahead, to_A, to_at):
    """32 columns of two rows side by side, [32, 2]; fetches what lies `ahead` elements further on in both rows."""

    def code(context, builder, signature, arguments):
        source, target = (_start(context, builder, signature.args[i], arguments[i]) for i in (0, 4))
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        )
        lines = []
        for at in arguments[1:3]:
            offset = builder.mul(at, _I64(2))
            lines.append(builder.load(_at(builder, source, offset, _LINE), align=2))
            distant = builder.gep(source, [builder.add(offset, builder.mul(arguments[3], _I64(2)))])
            builder.call(fetch, [distant, _I32(0), _I32(2), _I32(1)])
        for half in range(2):
            both = _pick(builder, lines[0], lines[1], [lane for c in range(16 * half, 16 * half + 16) for lane in (c, c + 32)])
            offset = builder.add(builder.mul(arguments[5], _I64(4)), _I64(64 * half))
            builder.store(both, _at(builder, target, offset, _LINE), align=4)
        return context.get_dummy_value()

    return types.void(from_A, types.intp, types.intp, types.intp, to_A, types.intp), code
