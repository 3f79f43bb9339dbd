"""Foresight: how much of a layer's choice can be known before its router runs, and whether prefetching can pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.result import NotRecorded, Statistic, mean, plain


@dataclass(frozen=True)
class Foresight(Statistic):
    """Recall: the share of a layer's choices that are among the w experts that a predictor names. A counts layers looked
    ahead, W widths.

    Attributes:
        widths_W: experts named; those of a token, and twice as many, where the trace keeps so many.
        ahead_LAW, low_LAW, high_LAW: named by the layer's own router on the input of the layer 1 to A before it, and the
            interval; NaN for layers that have none so far before them.
        previous_LW: the experts of the tokens before, latest first. frequent_LW: the layer's most used experts in this
            very trace. chance_LW: w / E.
    """

    widths_W: np.ndarray
    ahead_LAW: np.ndarray
    low_LAW: np.ndarray
    high_LAW: np.ndarray
    previous_LW: np.ndarray
    frequent_LW: np.ndarray
    chance_LW: np.ndarray

    def summary(self) -> dict[str, Any]:
        def by_width(values_LW: np.ndarray) -> dict[str, Any]:
            return {str(w): plain(mean(values_LW[:, i])) for i, w in enumerate(self.widths_W)}

        found = {f"look_ahead_{a + 1}_recall": by_width(self.ahead_LAW[:, a]) for a in range(self.ahead_LAW.shape[1])}
        later = {"previous_tokens": self.previous_LW, "most_used": self.frequent_LW, "chance": self.chance_LW}
        return found | {f"{name}_recall": by_width(values_LW[1:]) for name, values_LW in later.items()}

    def by_layer(self) -> list[dict[str, Any]]:
        found = []
        for l in range(len(self.chance_LW)):
            recalls = {"look_ahead": self.ahead_LAW[l, 0], "previous_tokens": self.previous_LW[l]}
            recalls |= {"most_used": self.frequent_LW[l], "chance": self.chance_LW[l]}
            wide = {name: {str(w): v for w, v in zip(self.widths_W, values, strict=True)} for name, values in recalls.items()}
            found.append({"foresight": plain(wide)})
        return found


@register("statistics", "foresight", paper="2502.12224", card="serving-and-scale.md#fate-next-gate-on-this-layers-input")
def foresight(trace: Trace, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Foresight:
    """Recall of the routers' look-ahead, beside what the last tokens, the most used experts and chance give.

    Layers of one stream are next to each other in its order. Raises NotRecorded for a trace without look-ahead, BadInput
    for an empty one.
    """
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    if trace.ahead_TLAM is None:
        raise NotRecorded(f"{trace.name} has no look-ahead: record it with --lookahead 3")
    layers, depth, kept = len(trace.layers), trace.ahead_TLAM.shape[2], trace.ahead_TLAM.shape[3]
    widths = np.array(sorted({min(trace.top_k, kept), min(2 * trace.top_k, kept)}))
    counts_LE = np.zeros((layers, trace.num_experts), np.int64)
    for block in rows.sequences(trace):
        for l in range(layers):
            ids = block.experts_tLK[:, l]
            counts_LE[l] += np.bincount(ids[ids >= 0], minlength=trace.num_experts)
    usual_LW = np.argsort(-counts_LE, 1, kind="stable")[:, : widths[-1]]
    predictors = depth + 2
    sums = np.zeros((bootstrap.units, layers, predictors * len(widths) + 1))
    for block in rows.sequences(trace):
        ids = rows.distinct(block.experts_tLK)
        ahead = np.asarray(trace.ahead_TLAM[block.rows])
        found = np.zeros((*ids.shape[:2], predictors, len(widths)), np.float32)
        for l in range(layers):
            for a in range(min(depth, l)):
                found[:, l, a] = _hits(ids[:, l], ahead[:, l - 1 - a, a], widths)
            found[:, l, depth] = _hits(ids[:, l], _before(ids[:, l], block.starts_s1, int(widths[-1])), widths)
            found[:, l, depth + 1] = _hits(ids[:, l], np.broadcast_to(usual_LW[l], (len(ids), int(widths[-1]))), widths)
        both = np.concatenate([found.reshape(*ids.shape[:2], -1), (ids >= 0).sum(2)[..., None]], -1).astype(np.float64)
        np.add.at(sums, bootstrap.unit_S[block.sequences], rows.per_sequence(both, block.starts_s1))

    def recalls(x: np.ndarray) -> np.ndarray:
        return x[..., :-1] / x[..., -1:]

    low, high = bootstrap.interval(recalls, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = recalls(sums.sum(0))
    shape = (layers, predictors, len(widths))
    value, low, high = (part.reshape(shape) for part in (value, low, high))
    for l in range(layers):  # the first layers have nothing so far before them
        for part in (value, low, high):
            part[l, min(depth, l) : depth] = np.nan
    chance = widths[None] / trace.experts_L[:, None]
    return Foresight(widths, value[:, :depth], low[:, :depth], high[:, :depth], value[:, depth], value[:, depth + 1], chance)


def _hits(ids_tK: np.ndarray, named_tM: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """How many of each row's choices are among the first w names, for every width: [t, W]."""
    place_tK = np.full(ids_tK.shape, named_tM.shape[1])
    for m in range(named_tM.shape[1] - 1, -1, -1):
        place_tK = np.where(ids_tK == named_tM[:, m : m + 1], m, place_tK)
    held = ids_tK >= 0
    return np.stack([(held & (place_tK < w)).sum(1) for w in widths], 1)


def _before(ids_tK: np.ndarray, starts_s1: np.ndarray, width: int) -> np.ndarray:
    """The last `width` choices of the tokens before, latest first, within the sequence; -2 where there are none."""
    tokens, slots = ids_tK.shape
    first_t = np.repeat(starts_s1[:-1], np.diff(starts_s1))
    named = np.full((tokens, -(-width // slots), slots), -2, np.int64)
    for back in range(1, named.shape[1] + 1):
        source = np.arange(tokens) - back
        inside = source >= first_t
        named[inside, back - 1] = np.where(ids_tK[source[inside]] >= 0, ids_tK[source[inside]], -2)
    return named.reshape(tokens, -1)[:, :width]
