"""Four rows of codes (8, 4 or 2 bits) times one, two or four rows of activations: the microkernel of quantised decoding.

Activations are 16-bit integers with one scale per group of inputs, finer than the bf16 they come from, because
`vpdpwssd` multiplies 32 pairs of 16-bit integers and adds neighbours to 16 sums, exactly. 32 bytes of codes, each byte
widened to a 16-bit lane, give the codes of 32 * (8 / bits) inputs, a *unit*: a shift and a mask take the first, second, ...
code of every byte, a *plane*. So activations are stored by planes (compiled/codes.py), and codes as they lie in memory.

A unit of prepared activations is its planes (64 bytes each), `start` (what the levels' offset adds to each of the 16 sums)
and the activations' scale in each lane. A unit's sums become fp32 and are added times both scales.

Numba's cache looks at the file of a pass alone: after a change here, touch codes.py.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 32
"""Bytes of codes in a unit, and 16-bit lanes in a vector."""

ROWS = 4
"""Rows of codes taken at a time."""

_I16, _I32, _I64, _BYTES = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_CODES, _WORDS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(_I16, LANES)
_INTS, _SUMS = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)


AHEAD = 4096
"""Bytes of codes fetched ahead into the second-level cache: without it a core reads 6 GB/s, with it 17 to 23."""

KINDS = ((8, 1), (4, 1), (4, 2), (2, 1), (2, 2), (2, 4))
"""(bits, groups in a unit) of the dots there are; 1 also where a group has several units."""

COUNTS = (1, 2, 4)
"""Rows of activations taken at a time."""


@intrinsic
def dot(context, case, codes_4, scale_4, x_4, units, shift, out):
    """out[4 * x + w] = row w of codes times row x of activations, fp32. `case` is kind * 3 + index of the count; addresses
    come as arrays of four integers; unit u belongs to group u >> shift."""

    def code(context, builder, signature, arguments):
        emit = _Emit(context, builder)
        end = builder.append_basic_block("end")
        choice = builder.switch(arguments[0], end)
        for kind, (bits, scales) in enumerate(KINDS):
            for which, count in enumerate(COUNTS):
                block = builder.append_basic_block(f"int{bits}_{scales}_{count}")
                choice.add_case(_I64(kind * len(COUNTS) + which), block)
                builder.position_at_end(block)
                codes, scale, rows = (
                    emit.addresses(signature.args[i], arguments[i], n) for i, n in ((1, ROWS), (2, ROWS), (3, count))
                )
                into = emit.data(signature.args[6], arguments[6])
                for row, four in enumerate(emit.units(bits, scales, codes, scale, rows, arguments[4], arguments[5])):
                    emit.store(emit.reduced(four), into, 4 * ROWS * row)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(types.intp, codes_4, scale_4, x_4, types.intp, types.intp, out), code


class _Emit:
    """The pieces of a dot as LLVM IR."""

    def __init__(self, context, builder):
        self.context, self.builder = context, builder
        declare = builder.module.declare_intrinsic
        self.dot = declare("llvm.x86.avx512.vpdpwssd.512", (), ir.FunctionType(_INTS, [_INTS, _INTS, _INTS]))
        self.fma = declare("llvm.fma.v16f32", (), ir.FunctionType(_SUMS, [_SUMS, _SUMS, _SUMS]))

        self.fetch = declare("llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32]))

    def data(self, kind, value):
        return self.builder.bitcast(self.context.make_array(kind)(self.context, self.builder, value).data, _BYTES)

    def addresses(self, kind, value, count):
        held = self.builder.bitcast(self.data(kind, value), _I64.as_pointer())
        loads = [self.builder.load(self.builder.gep(held, [_I64(i)]), align=8) for i in range(count)]
        return [self.builder.inttoptr(address, _BYTES) for address in loads]

    def load(self, kind, start, offset, align=2):
        return self.builder.load(self.builder.bitcast(self.builder.gep(start, [offset]), kind.as_pointer()), align=align)

    def store(self, vector, start, offset):
        self.builder.store(
            vector, self.builder.bitcast(self.builder.gep(start, [_I64(offset)]), vector.type.as_pointer()), align=4
        )

    def pick(self, left, right, lanes):
        return self.builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def units(self, bits, scales, codes, scale, rows, units, shift):
        """The loop over units: accumulators [row of activations][row of codes]."""
        builder, planes = self.builder, 8 // bits
        before, loop, after = builder.block, builder.append_basic_block("units"), builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        unit = builder.phi(_I64)
        unit.add_incoming(_I64(0), before)
        carried = [[builder.phi(_SUMS) for _ in codes] for _ in rows]
        in_codes, in_rows = builder.mul(unit, _I64(LANES)), builder.mul(unit, _I64(64 * (planes + 2)))
        in_scale = builder.mul(builder.lshr(unit, shift), _I64(2 * scales))
        for start in codes:
            builder.call(self.fetch, [builder.gep(start, [builder.add(in_codes, _I64(AHEAD))]), _I32(0), _I32(2), _I32(1)])
        words = [self.planes(self.load(_CODES, start, in_codes, 1), bits, planes) for start in codes]
        weight_scales = [self.spread(start, in_scale, scales) for start in scale]
        sums = []
        for x, start in enumerate(rows):
            at = [builder.add(in_rows, _I64(64 * part)) for part in range(planes + 2)]
            x_planes = [self.load(_INTS, start, offset, 64) for offset in at[:planes]]
            offset, x_scale = self.load(_INTS, start, at[planes], 64), self.load(_SUMS, start, at[planes + 1], 64)
            totals = []
            for w, of_row in enumerate(words):
                total = offset
                for one, other in zip(of_row, x_planes, strict=True):
                    total = builder.call(self.dot, [total, one, other])
                both = builder.fmul(weight_scales[w], x_scale)
                totals.append(builder.call(self.fma, [builder.sitofp(total, _SUMS), both, carried[x][w]]))
            sums.append(totals)
        following = builder.add(unit, _I64(1))
        unit.add_incoming(following, loop)
        for phis, totals in zip(carried, sums, strict=True):
            for phi, total in zip(phis, totals, strict=True):
                phi.add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
                phi.add_incoming(total, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, units), loop, after)
        builder.position_at_end(after)
        return sums

    def planes(self, codes, bits, planes):
        """The first, second, ... codes of 32 bytes, as 16-bit lanes."""
        builder, wide = self.builder, self.builder.zext(codes, _WORDS)
        made = []
        for plane in range(planes):
            shifted = builder.lshr(wide, ir.Constant(_WORDS, [bits * plane] * LANES)) if plane else wide
            last = plane == planes - 1  # nothing lies above it
            kept = shifted if last else builder.and_(shifted, ir.Constant(_WORDS, [2**bits - 1] * LANES))
            made.append(builder.bitcast(kept, _INTS))
        return made

    def spread(self, start, offset, scales):
        """`scales` consecutive bf16 numbers as fp32, each in its share of the 16 lanes: bf16 is fp32's upper half."""
        builder = self.builder
        if scales == 4:
            held = self.load(ir.VectorType(_I16, 4), start, offset)
            lanes = [4 if lane % 2 == 0 else lane // 8 for lane in range(LANES)]
            return builder.bitcast(self.pick(held, ir.Constant(held.type, [0] * 4), lanes), _SUMS)
        held = self.load(_I16 if scales == 1 else _I32, start, offset)
        if scales == 1:
            held = builder.shl(builder.zext(held, _I32), _I32(16))
        nothing = ir.Constant(_INTS, ir.Undefined)
        words = self.pick(builder.insert_element(nothing, held, _I32(0)), nothing, [0] * 16)
        if scales == 2:
            words = builder.shl(words, ir.Constant(_INTS, [16] * 8 + [0] * 8))
            words = builder.and_(words, ir.Constant(_INTS, [0xFFFF0000] * 16))
        return builder.bitcast(words, _SUMS)

    def reduced(self, four):
        """The sums over the lanes of four vectors, as one vector of four."""
        builder = self.builder

        def fold(left, right, low, high):
            return builder.fadd(self.pick(left, right, low), self.pick(left, right, high))

        halves = [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]
        one, two = (fold(four[i], four[i + 1], halves, [lane + 8 for lane in halves]) for i in (0, 2))
        quarters = [lane + block for block in (0, 8, 16, 24) for lane in range(4)]
        all_four = fold(one, two, quarters, [lane + 4 for lane in quarters])
        eighths = [lane + block for block in (0, 4, 8, 12) for lane in range(2)]
        paired = fold(all_four, all_four, eighths, [lane + 2 for lane in eighths])
        return fold(paired, paired, [0, 2, 4, 6], [1, 3, 5, 7])
