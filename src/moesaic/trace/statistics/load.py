"""Load: the share of a layer's choices that each expert gets, overall and by domain, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics.counting import Counts, count, share
from moesaic.trace.statistics.result import Statistic, plain


@dataclass(frozen=True)
class Load(Statistic):
    """Shares sum to 1 over a layer's experts; an even load is 1/E. Cells that are no expert of their layer are NaN.

    Attributes:
        experts_L: experts of each layer. counts_LE: filled slots.
        share_LE, low_LE, high_LE: share of the layer's choices, and the ends of its confidence interval.
        domains, counts_DLE, share_DLE, low_DLE, high_DLE: the same within each domain.
    """

    experts_L: np.ndarray
    counts_LE: np.ndarray
    share_LE: np.ndarray
    low_LE: np.ndarray
    high_LE: np.ndarray
    domains: tuple[str, ...]
    counts_DLE: np.ndarray
    share_DLE: np.ndarray
    low_DLE: np.ndarray
    high_DLE: np.ndarray

    def summary(self) -> dict[str, Any]:
        by_domain = dict(zip(self.domains, self.counts_DLE.sum((1, 2)).tolist(), strict=True))
        return {"choices": int(self.counts_LE.sum()), "choices_by_domain": by_domain}

    def by_layer(self) -> list[dict[str, Any]]:
        tables = {"load": self.share_LE, "load_low": self.low_LE, "load_high": self.high_LE}
        rows = [{name: plain(table[l, :e]) for name, table in tables.items()} for l, e in enumerate(self.experts_L)]
        for l, row in enumerate(rows if self.domains else []):
            tables_DE = self.share_DLE[:, l, : self.experts_L[l]]
            row["load_by_domain"] = dict(zip(self.domains, plain(tables_DE), strict=True))
        return rows


@register("statistics", "load", card="serving-and-scale.md#c-placement-across-devices")
def load(
    source: Trace | Counts, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0, by_domain: bool = True
) -> Load:
    """Load of every expert.

    Args:
        source: a trace, or counts [L, E] (a dict: by domain), for which there are no intervals.
        resamples: bootstrap resamples of sequences; 0 for none.
        by_domain: also each domain's load and interval.

    Raises:
        BadInput: an empty trace, or tables that are no counts.
    """
    found = count(source, resamples, confidence, seed)
    counts_LE = found.counts_ULE.sum(0)
    domains = found.domains if by_domain else ()
    counts_DLE = found.counts_DLE[: len(domains)]
    unknown = np.full(counts_LE.shape, np.nan)
    overall, each = (unknown, unknown), [(unknown, unknown)] * len(domains)
    if found.bootstrap is not None:
        overall = found.bootstrap.interval(share, found.counts_ULE)
        each = [found.bootstrap.interval(share, found.counts_ULE, d) for d in range(len(domains))]
    ends_DLE = [np.array([ends[i] for ends in each]).reshape(len(domains), *counts_LE.shape) for i in (0, 1)]
    tables = [share(counts_LE), *overall, share(counts_DLE), *ends_DLE]
    share_LE, low_LE, high_LE, share_DLE, low_DLE, high_DLE = (np.where(found.real_LE, table, np.nan) for table in tables)
    return Load(found.real_LE.sum(1), counts_LE, share_LE, low_LE, high_LE, domains, counts_DLE, share_DLE, low_DLE, high_DLE)
