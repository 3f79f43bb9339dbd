"""Drops: the choices that a capacity limit would drop, which fall on the ends of sequences (OpenMoE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.compiled import compiled
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.result import Statistic, plain


@dataclass(frozen=True)
class Drops(Statistic):
    """With capacity C = ceil(cf K T / E) per expert, layer and sequence of T tokens, earlier tokens first. F counts capacity
    factors, B equal parts of a sequence from its beginning to its end.

    Attributes:
        factors_F: capacity factors cf. dropped_F, low_F, high_F: share of all choices dropped, and its interval.
        dropped_FL: by layer. position_FB, position_low_FB, position_high_FB: by part of the sequence.
        domains, domain_FD: by domain. domain_position_FDB: by domain and part.
    """

    factors_F: np.ndarray
    dropped_F: np.ndarray
    low_F: np.ndarray
    high_F: np.ndarray
    dropped_FL: np.ndarray
    position_FB: np.ndarray
    position_low_FB: np.ndarray
    position_high_FB: np.ndarray
    domains: tuple[str, ...]
    domain_FD: np.ndarray
    domain_position_FDB: np.ndarray

    def summary(self) -> dict[str, Any]:
        found = []
        for f, factor in enumerate(self.factors_F):
            row: dict[str, Any] = {"capacity_factor": factor, "dropped_share": self.dropped_F[f]}
            row |= {"low": self.low_F[f], "high": self.high_F[f], "dropped_share_by_position": self.position_FB[f]}
            row["dropped_share_by_domain"] = dict(zip(self.domains, self.domain_FD[f].tolist(), strict=True))
            found.append(plain(row))
        return {"rows": found}

    def by_layer(self) -> list[dict[str, Any]]:
        factors = [f"{factor:g}" for factor in self.factors_F]
        return [{"dropped_share": dict(zip(factors, plain(share_F), strict=True))} for share_F in self.dropped_FL.T]


@register(
    "statistics",
    "drops",
    paper="2402.01739",
    card="layers-and-balancing.md#openmoe-measuring-context-independent-specialisation-and-dropping",
)
def drops(
    trace: Trace,
    *,
    capacity_factors: Sequence[float] = (1.0, 1.25, 2.0),
    bins: int = 16,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Drops:
    """Shares of choices that each capacity factor would drop; see `Drops` for the fields.

    Args:
        capacity_factors: cf; E/K and more drop nothing. bins: parts of a sequence.

    Raises:
        BadInput: an empty trace, a factor not above 0, or fewer than one part.
    """
    for factor in capacity_factors:
        if not 0 < factor < np.inf:
            raise BadInput(f"capacity factor {factor}: must be above 0")
    if bins < 1 or not len(capacity_factors):
        raise BadInput(f"bins {bins}: must be at least 1, with at least one capacity factor")
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    factors_F = np.array(capacity_factors, float)
    own_SL, layers = rows.own_SL(trace), len(trace.layers)
    dropped = np.zeros((len(factors_F), bootstrap.units, layers, bins), np.int64)
    chosen = np.zeros((bootstrap.units, layers, bins), np.int64)
    each_L = rows.top_k_L(trace) / trace.experts_L
    for block in rows.sequences(trace):
        ids = rows.distinct(block.experts_tLK)
        # less a hair, because cf K T / E may be a whole number that floating point overshoots
        capacity = np.ceil(factors_F[:, None, None] * np.diff(block.starts_s1)[:, None] * each_L - 1e-9).astype(np.int64)
        own, units = own_SL[block.sequences], bootstrap.unit_S[block.sequences]
        overflow(ids, trace.experts_L, block.starts_s1, own, units, capacity, dropped, chosen)
    counts = np.concatenate([chosen[None], dropped]).transpose(1, 0, 2, 3)

    def shares(x: np.ndarray) -> np.ndarray:
        return x[:, 1:] / x[:, :1]

    low, high = bootstrap.interval(shares, counts.sum((2, 3)))
    position_low, position_high = bootstrap.interval(shares, counts.sum(2))
    with np.errstate(invalid="ignore", divide="ignore"):
        whole = counts.sum(0)[None]
        by_domain = [counts[bootstrap.domain_U == d].sum((0, 2))[None] for d in range(len(trace.domains))]
        every = shares(whole.sum((2, 3)))[0]
        by_layer, by_position = shares(whole.sum(3))[0], shares(whole.sum(2))[0]
        domain = [shares(x.sum(2))[0] for x in by_domain]
        both = [shares(x)[0] for x in by_domain]
    shape = (len(domain), len(factors_F))
    return Drops(
        factors_F, every, low, high, by_layer, by_position, position_low, position_high, trace.domains,
        np.array(domain).reshape(shape).T, np.array(both).reshape(*shape, bins).swapaxes(0, 1),
    )  # fmt: skip


@compiled
def overflow(experts_tLK, experts_L, starts_s1, own_sL, unit_s, capacity_FsL, dropped_FULB, chosen_ULB):
    """Count a block's choices, and those that come when their expert has reached its capacity, by part of the sequence."""
    layers, slots = experts_tLK.shape[1], experts_tLK.shape[2]
    bins = chosen_ULB.shape[2]
    most = 0
    for l in range(layers):
        most = max(most, experts_L[l])
    before_E = np.zeros(most, np.int64)
    for s in range(len(unit_s)):
        first, stop, unit = starts_s1[s], starts_s1[s + 1], unit_s[s]
        for l in range(layers):
            if not own_sL[s, l]:
                continue
            before_E[:] = 0
            for t in range(first, stop):
                part = (t - first) * bins // (stop - first)
                for k in range(slots):
                    e = experts_tLK[t, l, k]
                    if e < 0:
                        continue
                    chosen_ULB[unit, l, part] += 1
                    for f in range(len(capacity_FsL)):
                        if before_E[e] >= capacity_FsL[f, s, l]:
                            dropped_FULB[f, unit, l, part] += 1
                    before_E[e] += 1
