"""Earlier routing, as policies learn from it: a trace and the passes of it that may be looked at."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from moesaic.trace.file import Trace
from moesaic.trace.order import EMPTY, Order
from moesaic.trace.policies.learned import mix, path_key
from moesaic.trace.policies.loops import compiled


class History:
    """Counts, requests and paths of earlier routing, each made when first asked for.

    `label` says where it is from; `itself` that it is the very routing that will be replayed.
    """

    def __init__(self, trace: Trace, order: Order, label: str, itself: bool = False) -> None:
        self.trace, self.order, self.label, self.itself = trace, order, label, itself

    @cached_property
    def counts_LE(self) -> np.ndarray:
        """Choices of every expert."""
        out = np.zeros((len(self.trace.layers), self.trace.num_experts), np.int64)
        for block in self.order.blocks(self.trace):
            ids = block.ids_TLK[: block.starts_N1[block.steps]].astype(np.int64)
            for l in range(ids.shape[1]):
                chosen = ids[:, l][ids[:, l] != EMPTY]
                out[l] += np.bincount(chosen, minlength=out.shape[1])
        return out

    @cached_property
    def requests(self) -> list[tuple[int, np.ndarray]]:
        """(1 for prefill or 0 for decoding, counts [L, E]) of every request, in order."""
        found: list[tuple[int, np.ndarray]] = []
        phase, counts = -1, np.zeros((len(self.trace.layers), self.trace.num_experts))
        for block in self.order.blocks(self.trace):
            for s in range(block.steps):
                first, last = block.starts_N1[s], block.starts_N1[s + 1]
                now = int(last - first > 1)
                if block.fresh_N[s] or now != phase:
                    if phase >= 0 and counts.any():
                        found.append((phase, counts))
                    phase, counts = now, np.zeros_like(counts)
                _add(block.ids_TLK, first, last, counts)
        if phase >= 0 and counts.any():
            found.append((phase, counts))
        return found

    def paths(self, width: int, most: int = 1 << 20) -> tuple[np.ndarray, np.ndarray]:
        """EdgeMoE's dictionary: sorted keys [P], and for each the `width` experts that most often came next [P, width], -1
        where it knows fewer. Of more than `most` tokens, the latest."""
        tokens = int(self.order.starts_N1[-1])
        rows = self.order.rows_T[max(0, tokens - most // len(self.trace.layers)) :]
        ids = np.asarray(self.trace.experts_TLK[np.sort(rows)]).astype(np.int64)
        held = ids != self.trace.empty
        sets_TL = np.where(held, mix(ids), 0).sum(2)
        keys, following = [], []
        for target in range(1, ids.shape[1]):
            before_T = sets_TL[:, target - 2] if target > 1 else np.zeros(len(ids), np.int64)
            key_T = path_key(before_T, sets_TL[:, target - 1], target)
            keys.append(np.repeat(key_T, held[:, target].sum(1)))
            following.append(ids[:, target][held[:, target]])
        key_C, next_C = np.concatenate(keys), np.concatenate(following)
        order = np.lexsort((next_C, key_C))
        return _table(key_C[order], next_C[order], width)

    def usual(self, width: int) -> np.ndarray:
        """The experts [L, width] that each layer chooses most often, -1 where it has fewer."""
        counts_LE = self.counts_LE
        order_LE = np.argsort(-counts_LE, axis=1, kind="stable")[:, :width]
        return np.where(np.take_along_axis(counts_LE, order_LE, 1) > 0, order_LE, -1)


@compiled
def _add(ids_TLK, first, last, counts_LE):
    for t in range(first, last):
        for l in range(ids_TLK.shape[1]):
            for k in range(ids_TLK.shape[2]):
                if ids_TLK[t, l, k] != EMPTY:
                    counts_LE[l, ids_TLK[t, l, k]] += 1


def _table(key_C: np.ndarray, next_C: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """From sorted (key, next) pairs, each key's most frequent nexts."""
    if not len(key_C):
        return np.zeros(0, np.int64), np.zeros((0, width), np.int64)
    new_pair = np.flatnonzero(np.r_[True, (np.diff(key_C) != 0) | (np.diff(next_C) != 0)])
    count = np.diff(np.r_[new_pair, len(key_C)])
    key, after = key_C[new_pair], next_C[new_pair]
    order = np.lexsort((after, -count, key))
    key, after = key[order], after[order]
    begin = np.flatnonzero(np.r_[True, np.diff(key) != 0])
    within = np.arange(len(key)) - np.repeat(begin, np.diff(np.r_[begin, len(key)]))
    keys, row = np.unique(key, return_inverse=True)
    table = np.full((len(keys), width), -1, np.int64)
    held = within < width
    table[row[held], within[held]] = after[held]
    return keys, table
