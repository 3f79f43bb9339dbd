"""Reuse: LRU hit rate at every cache size from one pass, how long experts stay away, and working sets of n tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import caches, rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.recency import absences, stack
from moesaic.trace.statistics.result import Statistic, mean, plain


@dataclass(frozen=True)
class Reuse(Statistic):
    """Per layer; an LRU cache of the layer's own, empty where a sequence begins.

    Attributes:
        distance_LE: choices found at each place of the stack: other experts used since, those of its own token not counted.
        first_L: choices of an expert that the sequence had not used. choices_L: all.
        lru_LE: hit rate of a cache of 1 to E experts, first uses being misses (strict). Exact from K experts on, where a
            token's own experts cannot evict one another. warm_LE: first uses while a slot is free count as hits.
        rho_C, size_LC, hit_LC, low_LC, high_LC: strict hit rate and its interval at rho active sets.
        tokens_N: window lengths n, powers of two up to the longest sequence.
        working_set_LN: mean number of distinct experts in windows of n tokens.
        away_LN: share of repeated choices that come back within n tokens (1: at the next token).
    """

    distance_LE: np.ndarray
    first_L: np.ndarray
    choices_L: np.ndarray
    lru_LE: np.ndarray
    warm_LE: np.ndarray
    rho_C: np.ndarray
    size_LC: np.ndarray
    hit_LC: np.ndarray
    low_LC: np.ndarray
    high_LC: np.ndarray
    tokens_N: np.ndarray
    working_set_LN: np.ndarray
    away_LN: np.ndarray

    def summary(self) -> dict[str, Any]:
        with np.errstate(invalid="ignore", divide="ignore"):
            hit = (self.hit_LC * self.choices_L[:, None]).sum(0) / self.choices_L.sum()
        return plain(
            {
                "lru_hit_rate": {f"{rho:g}": hit[c] for c, rho in enumerate(self.rho_C)},
                "window_tokens": self.tokens_N,
                "working_set_experts": mean(self.working_set_LN, 0),
                "back_within_tokens_share": mean(self.away_LN, 0),
            }
        )

    def by_layer(self) -> list[dict[str, Any]]:
        found = []
        for l, hit_C in enumerate(self.hit_LC):
            row = {"lru_hit_rate": {f"{rho:g}": hit_C[c] for c, rho in enumerate(self.rho_C)}}
            found.append(plain(row | {"working_set_experts": self.working_set_LN[l]}))
        return found


@register("statistics", "reuse", card="serving-and-scale.md#expert-streaming-as-users-ask-for-it")
def reuse(
    trace: Trace,
    *,
    rho: Sequence[float] = (1, 2, 4),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reuse:
    """Reuse distances, LRU curves and working sets of every layer; see `Reuse` for the fields.

    Args:
        rho: cache sizes, in active sets of K experts, that get an interval. resamples: of sequences; 0 for none.

    Raises:
        BadInput: an empty trace, or a rho not above 0.
    """
    rho_C = caches.check_rho(list(rho))
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    pools = caches.alone(trace)
    size_LC, layers, experts = caches.sizes(pools, rho_C), len(pools), trace.num_experts
    longest = int(trace.lengths_S.max())
    rows.check_table("reuse", layers, longest + 1)
    again, first = np.zeros((layers, experts), np.int64), np.zeros((layers, experts), np.int64)
    hits = np.zeros((bootstrap.units, layers, len(rho_C)), np.int64)
    uses = np.zeros((bootstrap.units, layers), np.int64)
    gaps, lengths = np.zeros((layers, longest + 1), np.int64), np.zeros((layers, longest + 1), np.int64)
    back = np.zeros((layers, longest + 1), np.int64)
    for ids, starts, own, units in caches.blocks(trace, pools, bootstrap):
        stack(ids, trace.experts_L, starts, own, units, size_LC, again, first, hits, uses)
        absences(ids, trace.experts_L, starts, own, gaps, lengths, back)
    both = np.concatenate([hits, uses[..., None]], -1)
    low, high = bootstrap.interval(lambda x: x[..., :-1] / x[..., -1:], both)
    choices = uses.sum(0)
    tokens_N = 2 ** np.arange(int(np.log2(longest)) + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        every = choices[:, None]
        lru, warm = np.cumsum(again, 1) / every, np.cumsum(again + first, 1) / every
        away = np.cumsum(back, 1)[:, tokens_N - 1] / back.sum(1)[:, None]
        hit = hits.sum(0) / every
    beyond = ~rows.real_LE(trace)
    lru[beyond], warm[beyond] = np.nan, np.nan
    working = working_sets(gaps, lengths, trace.experts_L)[:, tokens_N - 1]
    return Reuse(
        again, first.sum(1), choices, lru, warm, rho_C, size_LC, hit, low, high, tokens_N, working, away
    )  # fmt: skip


def working_sets(gaps_LG: np.ndarray, lengths_LG: np.ndarray, experts_L: np.ndarray) -> np.ndarray:
    """Mean distinct experts in all windows of n = 1, 2, ... tokens, [L, G - 1], NaN where no sequence is that long.

    A run of g tokens without an expert holds max(0, g - n + 1) windows of n tokens that miss it, so the lengths of these
    runs give every n at once.
    """

    def windows(histogram_LG: np.ndarray) -> np.ndarray:
        # sum over g of count(g) max(0, g - n + 1): summing the tails twice, for every n from 1 up
        tails = np.cumsum(histogram_LG[:, ::-1], 1)[:, ::-1]
        return np.cumsum(tails[:, ::-1], 1)[:, ::-1][:, 1:]

    total, missing = windows(lengths_LG), windows(gaps_LG)
    return np.divide(experts_L[:, None] * total - missing, total, out=np.full(total.shape, np.nan), where=total > 0)
