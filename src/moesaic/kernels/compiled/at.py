"""Tensors by address: what a compiled pass takes in place of NumPy arrays where a call's own time counts.

Wrapping a tensor as an array costs a few microseconds each time, several times what a decoding step's norm takes. Whoever
passes addresses has made sure of dtype, device and contiguity, and keeps the tensors alive during the call.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic


@intrinsic
def _pointer(context, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), code


@numba.njit(inline="always")
def bf16_at(address, rows, columns):
    """[rows, columns] of bf16, as uint16."""
    return numba.carray(_pointer(address), (rows, columns), np.uint16)


@numba.njit(inline="always")
def fp32_at(address, rows, columns):
    """[rows, columns] of fp32."""
    return numba.carray(_pointer(address), (rows, columns), np.float32)


@numba.njit(inline="always")
def int64_at(address, rows, columns):
    """[rows, columns] of int64."""
    return numba.carray(_pointer(address), (rows, columns), np.int64)


@numba.njit(inline="always")
def bf16_stack_at(address, count, rows, columns):
    """[count, rows, columns] of bf16, as uint16."""
    return numba.carray(_pointer(address), (count, rows, columns), np.uint16)
