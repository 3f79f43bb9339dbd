"""Balance: how evenly a layer's choices fall on its experts, as CV, Gini, entropy, spread and dead experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics.counting import Counts, count
from moesaic.trace.statistics.result import Statistic, mean, plain

MEASURES = ("cv", "gini", "entropy", "max_violation")


@dataclass(frozen=True)
class Balance(Statistic):
    """An even load has CV 0, Gini 0, entropy 1 and no violation; everything on one of E experts has CV sqrt(E - 1),
    Gini (E - 1)/E, entropy 0 and violation E - 1.

    Attributes:
        cv_L: standard deviation of the experts' counts over their mean. gini_L: Gini index of the counts.
        entropy_L: entropy of the load over log E. max_violation_L: largest count over the mean, minus 1.
        low_LQ, high_LQ: ends of the intervals of those four, in that order.
        sd_percent_L: standard deviation over experts of the percentage of tokens that choose each; NaN for tables.
        dead_LE: experts chosen no more than `dead_below` times as often as under an even load. dead_L: how many.
    """

    cv_L: np.ndarray
    gini_L: np.ndarray
    entropy_L: np.ndarray
    max_violation_L: np.ndarray
    low_LQ: np.ndarray
    high_LQ: np.ndarray
    sd_percent_L: np.ndarray
    dead_LE: np.ndarray
    dead_L: np.ndarray

    def summary(self) -> dict[str, Any]:
        means = {name: plain(mean(getattr(self, f"{name}_L"))) for name in MEASURES}
        return {f"mean_{name}": value for name, value in means.items()} | {"dead": int(self.dead_L.sum())}

    def by_layer(self) -> list[dict[str, Any]]:
        rows = []
        for l in range(len(self.cv_L)):
            row: dict[str, Any] = {name: getattr(self, f"{name}_L")[l] for name in MEASURES}
            row |= {f"{name}_low": self.low_LQ[l, q] for q, name in enumerate(MEASURES)}
            row |= {f"{name}_high": self.high_LQ[l, q] for q, name in enumerate(MEASURES)}
            row |= {"dead": int(self.dead_L[l]), "load_sd_percent": self.sd_percent_L[l]}
            rows.append(plain(row))
        return rows


def measures(counts_xE: np.ndarray) -> np.ndarray:
    """CV, Gini, normalised entropy and largest violation of counts [..., E]: [..., 4], NaN where all counts are 0."""
    experts = counts_xE.shape[-1]
    counts = np.asarray(counts_xE, float)
    total = counts.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = counts / total[..., None]
        cv = share.std(-1) * experts
        rank = 2 * np.arange(1, experts + 1) - experts - 1
        gini = (np.sort(share, -1) * rank).sum(-1) / experts
        logs = np.where(share > 0, np.log(np.where(share > 0, share, 1)), 0)
        entropy = -(share * logs).sum(-1) / np.log(experts) if experts > 1 else np.where(total > 0, 1.0, np.nan)
        return np.stack([cv, gini, entropy, share.max(-1) * experts - 1], -1)


@register(
    "statistics",
    "balance",
    card="layers-and-balancing.md#switch--gshard-load-balance-loss-capacity-and-router-z-loss-lbl-lz-the-baselines",
)
def balance(
    source: Trace | Counts, *, dead_below: float = 0.0, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Balance:
    """Evenness of every layer's load.

    Args:
        source: a trace, or counts [L, E] (a dict: by domain, which are added up).
        dead_below: an expert is dead at or below this multiple of an even load; 0: never chosen.

    Raises:
        BadInput: an empty trace, tables that are no counts, or `dead_below` outside [0, 1).
    """
    if not 0 <= dead_below < 1:
        raise BadInput(f"dead_below {dead_below}: must be at least 0 and below 1")
    found = count(source, resamples, confidence, seed)
    counts_LE, experts_L = found.counts_ULE.sum(0), found.real_LE.sum(1)
    layers = range(len(counts_LE))
    values = np.stack([measures(counts_LE[l, : experts_L[l]]) for l in layers])
    low = high = np.full(values.shape, np.nan)
    if found.bootstrap is not None:
        ends = [found.bootstrap.interval(measures, found.counts_ULE[:, l, : experts_L[l]]) for l in layers]
        low, high = (np.stack([end[i] for end in ends]) for i in (0, 1))
    sd = np.full(len(counts_LE), np.nan)
    if found.tokens_UL is not None:
        tokens_L = np.maximum(found.tokens_UL.sum(0), 1)
        sd = np.array([100 * (counts_LE[l, : experts_L[l]] / tokens_L[l]).std() for l in layers])
    even_L = counts_LE.sum(1) / experts_L
    dead_LE = (counts_LE <= dead_below * even_L[:, None]) & found.real_LE
    cv, gini, entropy, violation = values.T
    return Balance(cv, gini, entropy, violation, low, high, sd, dead_LE, dead_LE.sum(1))
