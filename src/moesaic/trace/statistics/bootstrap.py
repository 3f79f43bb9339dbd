"""Confidence intervals by resampling sequences: the tokens of one are not independent, so tokens are never resampled.

A measure keeps sums per unit (a sequence, or several where there are very many) and says how sums become its value; a
resample is then one row of weights, and all of them are one matrix product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace

MOST_UNITS = 1024
"""Beyond this, sequences of one domain are dealt at random into units: the interval is the same, its cost bounded."""


class Bootstrap:
    """Resamples of a trace's sequences.

    Attributes:
        unit_S: unit of each sequence. domain_U: domain of each unit, -1 = none.
    """

    def __init__(self, trace: Trace, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> None:
        if not len(trace):
            raise BadInput(f"{trace.name} holds no tokens: nothing was recorded")
        if resamples < 0:
            raise BadInput(f"resamples {resamples}: must be 0 (no intervals) or more")
        if not 0 < confidence < 1:
            raise BadInput(f"confidence {confidence}: must lie between 0 and 1")
        self.resamples, self.confidence, self.seed = resamples, confidence, seed
        self.domain_S = trace.domain_S
        self.unit_S = np.arange(len(trace.domain_S))
        if len(self.unit_S) > MOST_UNITS:
            self.unit_S = _deal(trace.domain_S, np.random.default_rng(seed))
        self.units = int(self.unit_S.max(initial=-1)) + 1
        self.domain_U = np.full(self.units, -1)
        self.domain_U[self.unit_S] = self.domain_S

    @cached_property
    def weights_BU(self) -> np.ndarray:
        """How often each unit is drawn in each resample (float32)."""
        rng = np.random.default_rng(self.seed + 1)
        return rng.multinomial(self.units, np.full(self.units, 1 / self.units), self.resamples).astype(np.float32)

    def interval(
        self, statistic: Callable[[np.ndarray], np.ndarray], sums_U: np.ndarray, domain: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the reversed (basic) interval [2x - q_hi, 2x - q_lo] around the value x.

        Args:
            statistic: from sums [B, ...] to values [B, ...].
            sums_U: [U, ...], what each unit adds to the sums.
            domain: only the sequences of this domain, resampled among themselves.
        NaN where fewer than two units hold anything, or `resamples` is 0: one sequence says nothing about the next.
        """
        flat_UX = sums_U.reshape(len(sums_U), -1)
        weights_BU = self.weights_BU
        if domain is not None:
            flat_UX, weights_BU = flat_UX[self.domain_U == domain], weights_BU[:, self.domain_U == domain]
        with np.errstate(invalid="ignore", divide="ignore"):
            value = statistic(flat_UX.sum(0, keepdims=True).reshape(1, *sums_U.shape[1:]))[0]
            if self.resamples == 0 or (flat_UX != 0).any(1).sum() < 2:
                return np.full_like(value, np.nan), np.full_like(value, np.nan)
            draws = weights_BU @ flat_UX.astype(np.float32)
            values = statistic(draws.reshape(len(draws), *sums_U.shape[1:]))
        tail = (1 - self.confidence) / 2
        quantile = np.nanquantile if np.isnan(values).any() else np.quantile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a cell that no resample filled stays NaN
            low, high = quantile(values, [tail, 1 - tail], axis=0)
        return 2 * value - high, 2 * value - low


def _deal(domain_S: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit of each sequence: every domain gets its share of the units, and deals its sequences to them at random."""
    unit_S = np.empty(len(domain_S), np.int64)
    at = 0
    for domain in np.unique(domain_S):
        members = np.flatnonzero(domain_S == domain)
        units = max(1, min(len(members), MOST_UNITS * len(members) // len(domain_S)))
        unit_S[rng.permutation(members)] = at + np.arange(len(members)) % units
        at += units
    return unit_S
