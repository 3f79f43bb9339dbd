"""Choices by group of tokens (domain, token id, position), as recorded and routed at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesaic.core.compiled import compiled
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows


class Counted:
    """Choices of groups of tokens: counts_LVE, tokens_LV, and which groups of a layer are frequent enough."""

    def __init__(self, ids_V: np.ndarray, counts_LVE: np.ndarray, tokens_LV: np.ndarray, trace: Trace, more_than: int) -> None:
        self.ids_V, self.counts_LVE, self.tokens_LV = ids_V, counts_LVE, tokens_LV
        self.experts_L, self.real_LE = trace.experts_L, rows.real_LE(trace)
        self.kept_LV = (tokens_LV > more_than) & (counts_LVE.sum(2) > 0)

    @property
    def ratio_LVE(self) -> np.ndarray:
        total = self.counts_LVE.sum(2, keepdims=True)
        shape = self.counts_LVE.shape
        ratio = np.divide(self.counts_LVE, total, out=np.full(shape, np.nan), where=self.kept_LV[..., None])
        return np.where(self.real_LE[:, None], ratio, np.nan)

    @property
    def per_token_LVE(self) -> np.ndarray:
        return np.where(self.real_LE[:, None], self.counts_LVE / np.maximum(self.tokens_LV, 1)[..., None], np.nan)

    @property
    def score_LV(self) -> np.ndarray:
        scores = [self.ratio_LVE[l, :, :e].std(1) for l, e in enumerate(self.experts_L)]
        return np.stack(scores)


def count_groups(
    trace: Trace, group: Callable[[rows.Rows], np.ndarray], ids_V: np.ndarray, more_than: int, seed: int
) -> tuple[Counted, Counted]:
    """Choices of the groups with these ids, as recorded and routed at random."""
    layers, experts = len(trace.layers), trace.num_experts
    rows.check_table("specialisation", layers, len(ids_V), experts)
    counts, at_random = (np.zeros((layers, len(ids_V), experts), np.int64) for _ in range(2))
    tokens = np.zeros((layers, len(ids_V)), np.int64)
    own_SL, rng = rows.own_SL(trace), np.random.default_rng(seed)
    for block in rows.sequences(trace):
        ids = rows.distinct(block.experts_tLK)
        value_t = group(block)
        group_t = np.searchsorted(ids_V, value_t).astype(np.int64)
        group_t[(group_t >= len(ids_V)) | (ids_V[np.minimum(group_t, len(ids_V) - 1)] != value_t if len(ids_V) else True)] = -1
        own_tL = own_SL[block.sequences][block.sequence_t]
        tally(ids, group_t, own_tL, counts, tokens)
        tally(_random(ids, trace, rng), group_t, own_tL, at_random, np.zeros_like(tokens))
    frequent = (tokens > more_than).any(0)
    kept = (ids_V[frequent], counts[:, frequent], tokens[:, frequent], trace, more_than)
    return Counted(*kept), Counted(kept[0], at_random[:, frequent], *kept[2:])


def frequent_ids(trace: Trace, more_than: int) -> np.ndarray:
    """Token ids that occur more often than that."""
    assert trace.tokens_T is not None
    seen = np.zeros(1, np.int64)
    for start in range(0, len(trace), 1 << 20):
        part = np.bincount(np.asarray(trace.tokens_T[start : start + (1 << 20)], np.int64), minlength=len(seen))
        part[: len(seen)] += seen
        seen = part
    return np.flatnonzero(seen > more_than)


def frequent_positions(trace: Trace, more_than: int) -> np.ndarray:
    """Positions that more sequences than that reach."""
    longest = np.sort(trace.lengths_S)[::-1]
    return np.arange(longest[more_than] if len(longest) > more_than else 0)


def _random(ids_tLK: np.ndarray, trace: Trace, rng: np.random.Generator) -> np.ndarray:
    """The same slots filled with distinct experts at random; layers of equal shape share their draw."""
    out = np.empty_like(ids_tLK)
    drawn: dict[int, np.ndarray] = {}
    for l, experts in enumerate(trace.experts_L):
        if int(experts) not in drawn:
            drawn[int(experts)] = random_sets(len(ids_tLK), int(experts), ids_tLK.shape[2], rng)
        out[:, l] = np.where(ids_tLK[:, l] >= 0, drawn[int(experts)], -1)
    return out


def random_sets(tokens: int, experts: int, slots: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of distinct experts, every set as likely; [tokens, slots], -1 where there are more slots than experts."""
    out = np.full((tokens, slots), -1, np.int32)
    wide = min(slots, experts)
    if wide * wide > experts:
        out[:, :wide] = np.argpartition(rng.random((tokens, experts), np.float32), wide - 1, 1)[:, :wide]
        return out
    left = np.arange(tokens)
    while len(left):  # draw whole rows again where an expert came twice
        draw = rng.integers(0, experts, (len(left), wide), np.int32)
        out[left, :wide] = draw
        order = np.sort(draw, 1)
        left = left[(order[:, 1:] == order[:, :-1]).any(1)]
    return out


@compiled
def tally(experts_tLK, group_t, own_tL, counts_LVE, tokens_LV):
    """Add a block's choices to the counts of their tokens' groups (-1: none)."""
    for t in range(len(group_t)):
        g = group_t[t]
        if g < 0:
            continue
        for l in range(experts_tLK.shape[1]):
            if own_tL[t, l]:
                tokens_LV[l, g] += 1
                for k in range(experts_tLK.shape[2]):
                    e = experts_tLK[t, l, k]
                    if e >= 0:
                        counts_LVE[l, g, e] += 1
