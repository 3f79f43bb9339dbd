"""Read a trace for statistics: whole sequences at a time, ids as int32 with -1 for an empty slot, layers with their rows.

Shape legend of this package: T tokens, L layers, E experts (the most of any layer), K slots, S sequences, D domains,
Z streams, U units of resampling, M window lengths, C cache sizes; small letters are those of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace

LARGEST_TABLE = 1 << 28
"""Cells of the largest table of counts that a measure makes (2 GiB)."""


class Rows(NamedTuple):
    """Consecutive whole sequences.

    Attributes:
        sequences: their range of numbers. rows: their range of rows.
        starts_s1: first row of each, counted from the first of `rows`, and the number of rows.
        experts_tLK: ids, -1 = empty slot.
    """

    sequences: slice
    rows: slice
    starts_s1: np.ndarray
    experts_tLK: np.ndarray

    @property
    def sequence_t(self) -> np.ndarray:
        """Number of each row's sequence within the block."""
        return np.repeat(np.arange(len(self.starts_s1) - 1), np.diff(self.starts_s1))


def sequences(trace: Trace, tokens: int = 1 << 14) -> Iterator[Rows]:
    """Blocks of about `tokens` rows that end where a sequence ends. Raises BadInput for a trace of no tokens."""
    if not len(trace):
        raise BadInput(f"{trace.name} holds no tokens: nothing was recorded")
    starts = trace.starts_S1
    first = 0
    while first < len(starts) - 1:
        stop = max(int(np.searchsorted(starts, starts[first] + tokens, "right")) - 1, first + 1)
        rows = slice(int(starts[first]), int(starts[stop]))
        yield Rows(slice(first, stop), rows, starts[first : stop + 1] - starts[first], ids(trace, rows))
        first = stop


def ids(trace: Trace, rows: slice | np.ndarray) -> np.ndarray:
    """Choices [t, L, K] of these rows as int32, -1 for an empty slot. Raises BadInput for an id that is no expert."""
    block = np.asarray(trace.experts_TLK[rows])
    out = np.where(block == trace.empty, np.int32(-1), block.astype(np.int32))
    if (out.max(axis=(0, 2), initial=-1) >= trace.experts_L).any():
        trace.check()  # says where: compiled loops would write outside their tables
    return out


def distinct(experts_tLK: np.ndarray) -> np.ndarray:
    """The same choices as sets: an expert that a row names twice at one layer keeps its first slot."""
    out = experts_tLK
    for i in range(1, out.shape[2]):
        twice = (out[..., :i] == out[..., i : i + 1]).any(2) & (out[..., i] >= 0)
        if twice.any():
            out = out.copy() if out is experts_tLK else out
            out[..., i][twice] = -1
    return out


def per_sequence(values_t: np.ndarray, starts_s1: np.ndarray) -> np.ndarray:
    """Sums over the rows of each sequence of a block (which may have none): [t, ...] to [s, ...]."""
    running = np.concatenate([np.zeros((1, *values_t.shape[1:]), values_t.dtype), np.cumsum(values_t, 0)])
    return np.diff(running[starts_s1], axis=0)


def own_SL(trace: Trace) -> np.ndarray:
    """Whether a layer sees the tokens of a sequence (bool): all do, unless there are an encoder's and a decoder's."""
    return trace.stream_S[:, None] == stream_L(trace)[None]


def stream_L(trace: Trace) -> np.ndarray:
    """Index into `trace.streams` of each layer."""
    return np.array([trace.streams.index(layer.stream) for layer in trace.layers])


def top_k_L(trace: Trace) -> np.ndarray:
    return np.array([layer.top_k for layer in trace.layers])


def real_LE(trace: Trace) -> np.ndarray:
    """Which cells of an [L, E] table are experts (bool); layers may have fewer than the most."""
    return np.arange(trace.num_experts)[None] < trace.experts_L[:, None]


def check_table(what: str, *sizes: int) -> None:
    """Raises BadInput where a table of counts would not fit in memory."""
    cells = int(np.prod([float(size) for size in sizes]))
    if cells > LARGEST_TABLE:
        raise BadInput(f"{what} needs a table of {' x '.join(map(str, sizes))} cells: too many experts for this measure")
