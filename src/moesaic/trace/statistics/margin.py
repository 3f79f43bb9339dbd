"""Margin: how decided the router is, from its weights, its logits where they are recorded, and its entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.result import NotRecorded, Statistic, mean, plain

PARTS = ("weight_margin", "weight_entropy", "boundary", "entropy")


@dataclass(frozen=True)
class Margin(Statistic):
    """Per layer: means over tokens, NaN where the column is not recorded or there is only one slot or expert.

    Attributes:
        value_LQ, low_LQ, high_LQ: and their intervals, of
            weight_margin: largest weight minus the next one, of tokens with two or more choices;
            weight_entropy: entropy of a token's weights, scaled to sum 1, over the log of their number;
            boundary: the lowest chosen logit minus the highest one left out, in logits; a small one is easily flipped;
                below 0 where a bias decides who is chosen;
            entropy: of softmax(logits), over log E; 0 is certain, 1 is no preference.
        edges_B1, margins_LB: histogram of weight margins, bins of [0, 1] (what is beyond falls in the outer bins).
    """

    value_LQ: np.ndarray
    low_LQ: np.ndarray
    high_LQ: np.ndarray
    edges_B1: np.ndarray
    margins_LB: np.ndarray

    def summary(self) -> dict[str, Any]:
        return {name: plain(mean(self.value_LQ[:, q])) for q, name in enumerate(PARTS)}

    def by_layer(self) -> list[dict[str, Any]]:
        found = []
        for l in range(len(self.value_LQ)):
            row: dict[str, Any] = {name: self.value_LQ[l, q] for q, name in enumerate(PARTS)}
            row |= {f"{name}_low": self.low_LQ[l, q] for q, name in enumerate(PARTS)}
            row |= {f"{name}_high": self.high_LQ[l, q] for q, name in enumerate(PARTS)}
            found.append({"margin": plain({name: value for name, value in row.items() if np.isfinite(value)})})
        return found


@register("statistics", "margin", card="serving-and-scale.md#hybrimoe-simulated-cpu-gpu-schedule-per-layer")
def margin(trace: Trace, *, bins: int = 50, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Margin:
    """Margins and entropies of every layer's router; see `Margin` for the fields.

    Args:
        bins: of the histogram of weight margins.

    Raises:
        NotRecorded: the trace has neither weights nor logits. BadInput: an empty trace, or fewer than one bin.
    """
    if trace.weights_TLK is None and trace.logits_TLE is None:
        raise NotRecorded(f"{trace.name} has neither weights nor logits: record it with them")
    if bins < 1:
        raise BadInput(f"bins {bins}: must be at least 1")
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    layers = len(trace.layers)
    sums = np.zeros((bootstrap.units, layers, 2 * len(PARTS)))  # each part's sum and how many tokens it has
    edges, histogram = np.linspace(0, 1, bins + 1), np.zeros((layers, bins), np.int64)
    for block in rows.sequences(trace):
        ids = block.experts_tLK
        parts = np.full((*ids.shape[:2], len(PARTS)), np.nan, np.float32)
        if trace.weights_TLK is not None:
            parts[..., :2] = _of_weights(np.asarray(trace.weights_TLK[block.rows], np.float32), ids >= 0)
            for l in range(layers):
                gaps = parts[:, l, 0]
                index = np.clip(gaps[np.isfinite(gaps)] * bins, 0, bins - 1).astype(np.int64)
                histogram[l] += np.bincount(index, minlength=bins)
        if trace.logits_TLE is not None:
            for l, experts in enumerate(trace.experts_L):
                logits = np.asarray(trace.logits_TLE[block.rows, l, :experts], np.float32)
                parts[:, l, 2:] = _of_logits(logits, ids[:, l])
        known = np.isfinite(parts)
        both = np.concatenate([np.where(known, parts, 0), known], -1).astype(np.float64)
        np.add.at(sums, bootstrap.unit_S[block.sequences], rows.per_sequence(both, block.starts_s1))

    def means(x: np.ndarray) -> np.ndarray:
        return x[..., : len(PARTS)] / x[..., len(PARTS) :]

    low, high = bootstrap.interval(means, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        return Margin(means(sums.sum(0)), low, high, edges, histogram)


def _of_weights(weights_tLK: np.ndarray, held: np.ndarray) -> np.ndarray:
    """[t, L, 2]: margin and normalised entropy of the filled slots, NaN for fewer than two."""
    filled = held.sum(-1)
    order = np.sort(np.where(held, weights_tLK, -np.inf), -1)
    several = filled >= 2
    out = np.full((*filled.shape, 2), np.nan, np.float32)
    if order.shape[-1] < 2:
        return out
    share = np.where(held, np.maximum(weights_tLK, 0), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = share / share.sum(-1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1) / np.log(filled)
        out[..., 0] = np.where(several, order[..., -1] - order[..., -2], np.nan)
    out[..., 1] = np.where(several, entropy, np.nan)
    return out


def _of_logits(logits_tE: np.ndarray, ids_tK: np.ndarray) -> np.ndarray:
    """[t, 2]: boundary and normalised entropy; NaN for tokens that this layer did not route."""
    tokens, experts = logits_tE.shape
    out = np.full((tokens, 2), np.nan, np.float32)
    routed = (ids_tK >= 0).any(1)
    if experts < 2 or not routed.any():
        return out
    chosen = np.zeros((tokens, experts + 1), bool)
    chosen[np.arange(tokens)[:, None], np.where(ids_tK >= 0, ids_tK, experts)] = True
    chosen = chosen[:, :experts]
    boundary = np.where(chosen, logits_tE, np.inf).min(1) - np.where(chosen, -np.inf, logits_tE).max(1)
    shifted = logits_tE - logits_tE.max(1, keepdims=True)
    weight = np.exp(shifted)
    total = weight.sum(1)
    entropy = np.log(total) - (weight * shifted).sum(1) / total
    out[:, 0] = np.where(np.isfinite(boundary), boundary, np.nan)
    out[:, 1] = entropy / np.log(experts)
    out[~routed] = np.nan
    return out
