"""Eight weight rows times up to 24 packed rows, in registers: the microkernel of many_rows.py.

It is emitted as LLVM IR because everything hangs on which value lies in a register: 24 accumulators, three vectors of
rows and a weight fill 27 of AVX-512's 32. One instruction, `vdpbf16ps`, multiplies 32 pairs of bf16 and adds neighbours
to 16 sums in fp32. A vector holds 4 consecutive columns of 8 rows (`GROUP`), which is what packed rows are; the same 4
columns of a stored weight row, 8 bytes, are loaded into every lane pair. So weights are read as they lie in memory, and
a row's sum ends up in two neighbouring lanes: one addition per sum, after the last column.

Numba's cache looks at the file of a pass alone: after a change here, touch many.py.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

GROUP = 8
"""Rows that one vector holds."""

MOST_GROUPS = 3
"""Groups that one tile takes: 3 x 8 accumulators."""

LINE = 32
"""Columns per turn of the loop: a cache line of every weight row. Divides the columns."""

_I32, _I64, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_SUMS, _PAIRS, _QUADS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(_I32, 16), ir.VectorType(_I64, 8)


def _tile(groups: int):
    @intrinsic
    def tile(context, rows_GA, first_4A, second_4A, ahead, out_G64):
        """out[g] = [weights' half, row, weight] of the sums over columns, for `groups` groups of packed rows and twice four
        weight rows; fetches the weights that lie `ahead` bytes further on into the second-level cache."""

        def code(context, builder, signature, arguments):
            emit = _Emit(context, builder)
            rows = emit.starts(signature.args[0], arguments[0], groups)
            weights = emit.starts(signature.args[1], arguments[1], 4) + emit.starts(signature.args[2], arguments[2], 4)
            columns = emit.size(signature.args[1], arguments[1], 1)
            sums = emit.products(rows, weights, columns, arguments[3])
            for start, of_group in zip(emit.starts(signature.args[4], arguments[4], groups), sums, strict=True):
                for part, vector in enumerate(emit.by_row(of_group[:4]) + emit.by_row(of_group[4:])):
                    emit.store(vector, start, 64 * part)
            return context.get_dummy_value()

        return types.void(rows_GA, first_4A, second_4A, types.intp, out_G64), code

    return tile


class _Emit:
    """The pieces of a tile as LLVM IR."""

    def __init__(self, context, builder):
        self.context, self.builder = context, builder
        declare = builder.module.declare_intrinsic
        # Newer LLVMs want vectors of bfloat here, and read these as such; older ones know only these.
        self.dot = declare("llvm.x86.avx512bf16.dpbf16ps.512", (), ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]))
        self.fetch = declare("llvm.prefetch", [_BYTES], ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32]))

    def _array(self, kind, value):
        return self.context.make_array(kind)(self.context, self.builder, value)

    def size(self, kind, value, axis):
        return self.builder.extract_value(self._array(kind, value).shape, axis)

    def starts(self, kind, value, count):
        """Addresses of an array's first `count` rows."""
        array = self._array(kind, value)
        step = self.builder.extract_value(array.strides, 0)
        data = self.builder.bitcast(array.data, _BYTES)
        return [self.builder.gep(data, [self.builder.mul(step, _I64(i))]) for i in range(count)]

    def load(self, kind, start, offset):
        pointer = self.builder.bitcast(self.builder.gep(start, [offset]), kind.as_pointer())
        return self.builder.load(pointer, align=2)

    def store(self, vector, start, offset):
        pointer = self.builder.bitcast(self.builder.gep(start, [_I64(offset)]), vector.type.as_pointer())
        self.builder.store(vector, pointer, align=4)

    def everywhere(self, quad):
        """Four bf16 of a weight row in all eight lane pairs."""
        nothing = ir.Constant(_QUADS, ir.Undefined)
        one = self.builder.insert_element(nothing, quad, _I32(0))
        return self.builder.bitcast(self.pick(one, nothing, [0] * 8), _PAIRS)

    def pick(self, left, right, lanes):
        return self.builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))

    def products(self, rows, weights, columns, ahead):
        """The loop over columns: accumulators [group][weight], two neighbouring lanes per row."""
        builder = self.builder
        before, loop, after = builder.block, builder.append_basic_block("columns"), builder.append_basic_block("sums")
        builder.branch(loop)
        builder.position_at_end(loop)
        line = builder.phi(_I64)
        line.add_incoming(_I64(0), before)
        carried = [[builder.phi(_SUMS) for _ in weights] for _ in rows]
        sums = [list(of_group) for of_group in carried]
        in_weights, in_rows = builder.mul(line, _I64(2 * LINE)), builder.mul(line, _I64(2 * LINE * GROUP))
        for weight in weights:
            distant = builder.gep(weight, [builder.add(in_weights, ahead)])
            builder.call(self.fetch, [distant, _I32(0), _I32(2), _I32(1)])  # a read, second level, data
        for quad in range(LINE // 4):
            packed = [self.load(_PAIRS, start, builder.add(in_rows, _I64(64 * quad))) for start in rows]
            for w, weight in enumerate(weights):
                spread = self.everywhere(self.load(_I64, weight, builder.add(in_weights, _I64(8 * quad))))
                for g, vector in enumerate(packed):
                    sums[g][w] = builder.call(self.dot, [sums[g][w], vector, spread])
        following = builder.add(line, _I64(1))
        line.add_incoming(following, loop)
        for g, of_group in enumerate(carried):
            for w, phi in enumerate(of_group):
                phi.add_incoming(ir.Constant(_SUMS, [0.0] * 16), before)
                phi.add_incoming(sums[g][w], loop)
        builder.cbranch(builder.icmp_unsigned("<", following, builder.udiv(columns, _I64(LINE))), loop, after)
        builder.position_at_end(after)
        return sums

    def by_row(self, four):
        """Four accumulators as [8 rows][4 weights], in two vectors."""
        two = []
        for left, right in (four[:2], four[2:]):
            even = self.pick(left, right, [lane for row in range(8) for lane in (2 * row, 2 * row + 16)])
            odd = self.pick(left, right, [lane for row in range(8) for lane in (2 * row + 1, 2 * row + 17)])
            two.append(self.builder.fadd(even, odd))
        halves = []
        for rows in (range(4), range(4, 8)):
            lanes = [lane for row in rows for lane in (2 * row, 2 * row + 1, 2 * row + 16, 2 * row + 17)]
            halves.append(self.pick(two[0], two[1], lanes))
        return halves


tile1, tile2, tile3 = _tile(1), _tile(2), _tile(3)
