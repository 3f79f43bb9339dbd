"""The order in which a trace is replayed: forward passes in time, and for policies that know the future, its next uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace
from moesaic.trace.policies.loops import compiled

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
        ids = wide(read(trace.experts_TLK, rows))
        starts = (self.starts_N1[first : end + 1] - self.starts_N1[first]).astype(np.int64)
        return Block(rows, ids, starts, self.fresh_N[first:last], last - first)


def read(column: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows of a column; a plain slice where they follow each other, which is several times as fast."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return np.asarray(column[rows[0] : rows[-1] + 1])
    return np.asarray(column[rows])


def wide(ids: np.ndarray) -> np.ndarray:
    """Ids in 16 bits, empty slots as EMPTY, so that the loops are compiled once."""
    if ids.dtype != np.uint8:
        return np.array(ids, np.uint16)  # a copy: compiled code tells what may be written from what may not
    return np.where(ids == np.iinfo(np.uint8).max, np.uint16(EMPTY), ids.astype(np.uint16))


def in_order(
    trace: Trace, as_decode: bool = False, batch: int = 0, sequences: Sequence[int] | np.ndarray | None = None
) -> Order:
    """The passes of a trace, or of some of its `sequences`, which are its requests.

    As recorded: one after another in time. `as_decode`: one token of a request per pass, whatever was recorded. `batch`: so
    many requests at a time, in the order given, go through their passes together (with `as_decode` token by token, else
    each batch as one prompt); 0 keeps what was recorded.
    """
    chosen = np.arange(len(trace.starts_S1) - 1) if sequences is None else np.asarray(sequences, np.int64)
    chosen = chosen[trace.lengths_S[chosen] > 0]
    if not as_decode and not batch:
        rows = trace.in_time()
        if sequences is not None:
            rows = rows[np.isin(trace.sequence_T[rows], chosen)]
        step_T, place_T = trace.step_T[rows], trace.position_T[rows]
    else:
        rows = np.concatenate(
            [np.arange(trace.starts_S1[s], trace.starts_S1[s + 1]) for s in chosen] or [np.zeros(0, np.int64)]
        )
        lengths = trace.lengths_S[chosen]
        place_T = trace.position_T[rows]
        group_T = np.repeat(np.arange(len(chosen)) // max(1, batch), lengths)
        step_T = group_T * (int(lengths.max(initial=0)) + 1) + (place_T if as_decode else 0)
        order = np.argsort(step_T, kind="stable")
        rows, step_T, place_T = rows[order], step_T[order], place_T[order]
    if not len(rows):
        return Order(rows, np.zeros(1, np.int64), np.zeros(0, bool))
    starts = np.flatnonzero(np.diff(step_T, prepend=step_T[0] - 1))
    fresh = np.add.reduceat((place_T == 0).astype(np.int64), starts) > 0
    return Order(rows, np.append(starts, len(rows)), fresh)


def apart(trace: Trace, share: float) -> tuple[np.ndarray, np.ndarray]:
    """About that share of the sequences, spread evenly over the trace, to learn from, and the others, to replay.

    Evenly, because a trace is often recorded text by text: its first part may know one domain only. Raises BadInput for a
    trace of one sequence, which cannot be parted.
    """
    count = len(trace.lengths_S)
    if count < 2:
        raise BadInput(f"{trace.name} is one sequence and cannot be parted to learn from: give another trace with --learn-from")
    learnt = np.diff(np.floor(np.arange(count + 1) * share + 0.5)) > 0
    if not learnt.any():
        learnt[0] = True
    if learnt.all():
        learnt[-1] = False
    return np.flatnonzero(learnt), np.flatnonzero(~learnt)


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
