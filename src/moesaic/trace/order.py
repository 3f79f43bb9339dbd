"""The order in which a trace is replayed: forward passes in time, and for policies that know the future, its next uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesaic.core.compiled import compiled
from moesaic.trace.file import Trace

EMPTY = 65535
"""The id of an empty slot in a block."""


class Block(NamedTuple):
    """Some forward passes, and one more whose rows can be looked at: `starts_N1` are the first rows of each, then the end."""

    rows_T: np.ndarray
    ids_TLK: np.ndarray
    starts_N1: np.ndarray
    fresh_N: np.ndarray
    steps: int


@dataclass
class Order:
    """Rows in replay order, and where each forward pass begins.

    Attributes:
        rows_T: rows of the trace in the order of replay.
        starts_N1: first of them in each pass, and their number.
        fresh_N: whether a request begins with this pass.
    """

    rows_T: np.ndarray
    starts_N1: np.ndarray
    fresh_N: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.fresh_N)

    def blocks(self, trace: Trace, choices: int = 1 << 22) -> Iterator[Block]:
        """Passes in blocks of about so many choices."""
        width = max(1, trace.experts_TLK.shape[1] * trace.experts_TLK.shape[2])
        first = 0
        while first < self.steps:
            limit = self.starts_N1[first] + max(1, choices // width)
            last = max(first + 1, int(np.searchsorted(self.starts_N1, limit, "right")) - 1)
            end = min(last + 1, self.steps)  # one pass more to look at
            yield self.block(trace, first, min(last, self.steps), end)
            first = last

    def block(self, trace: Trace, first: int, last: int, end: int) -> Block:
        rows = self.rows_T[self.starts_N1[first] : self.starts_N1[end]]
        ids = read(trace.experts_TLK, rows)
        if ids.dtype == np.uint8:
            ids = np.where(ids == trace.empty, np.uint16(EMPTY), ids.astype(np.uint16))
        starts = (self.starts_N1[first : end + 1] - self.starts_N1[first]).astype(np.int64)
        return Block(rows, ids, starts, self.fresh_N[first:last], last - first)


def read(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a column; a plain slice where they follow each other, which is several times as fast."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return np.asarray(column[rows[0] : rows[-1] + 1])
    return np.asarray(column[rows])


def in_order(trace: Trace, as_decode: bool = False) -> Order:
    """The passes as recorded; `as_decode`: sequence by sequence, one token per pass, whatever was recorded."""
    if as_decode:
        rows = np.arange(len(trace))
        fresh = np.zeros(len(trace), bool)
        fresh[trace.starts_S1[:-1][trace.lengths_S > 0]] = True
        return Order(rows, np.arange(len(trace) + 1), fresh)
    rows = trace.in_time()
    step = trace.step_T[rows]
    starts = np.concatenate([np.flatnonzero(np.diff(step, prepend=step[0] - 1)), [len(rows)]])
    begins = (trace.position_T[rows] == 0).astype(np.int64)
    fresh = np.add.reduceat(begins, starts[:-1]) > 0
    return Order(rows, starts, fresh)


NEVER = np.iinfo(np.int32).max


@compiled
def _next_uses(ids_TLK, starts_N1, first, after_LE, next_TLK):
    for s in range(len(starts_N1) - 2, -1, -1):
        for l in range(ids_TLK.shape[1]):
            for t in range(starts_N1[s], starts_N1[s + 1]):
                for k in range(ids_TLK.shape[2]):
                    e = ids_TLK[t, l, k]
                    if e != EMPTY:
                        next_TLK[t, l, k] = after_LE[l, e]
            for t in range(starts_N1[s], starts_N1[s + 1]):
                for k in range(ids_TLK.shape[2]):
                    e = ids_TLK[t, l, k]
                    if e != EMPTY:
                        after_LE[l, e] = first + s


def next_uses(trace: Trace, order: Order) -> np.ndarray:
    """Pass [T, L, K] that uses each choice's expert next, in replay order; NEVER where none does."""
    out = np.full(trace.experts_TLK.shape, NEVER, np.int32)
    after = np.full((len(trace.layers), trace.num_experts), NEVER, np.int32)
    size = max(1, order.steps // max(1, trace.experts_TLK.size >> 22))
    for first in reversed(range(0, order.steps, size)):
        last = min(first + size, order.steps)
        block = order.block(trace, first, last, last)
        at = order.starts_N1[first]
        _next_uses(block.ids_TLK, block.starts_N1, first, after, out[at : at + len(block.rows_T)])
    return out
