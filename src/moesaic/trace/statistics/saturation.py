"""Saturation: the share of routing choices that two checkpoints agree on, over the same text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.result import Statistic, mean, plain


@dataclass(frozen=True)
class Saturation(Statistic):
    """Per layer.

    Attributes:
        overlap_L, low_L, high_L: experts that both checkpoints choose for a token, over the K of the first; and its
            interval. chance_L: the same for choices at random, K'/E.
        first_L, first_low_L, first_high_L: share of tokens with the same first choice: the slot of the largest weight
            where weights are recorded, else the first slot.
        domains, overlap_DL: the overlap within each domain.
    """

    overlap_L: np.ndarray
    low_L: np.ndarray
    high_L: np.ndarray
    chance_L: np.ndarray
    first_L: np.ndarray
    first_low_L: np.ndarray
    first_high_L: np.ndarray
    domains: tuple[str, ...]
    overlap_DL: np.ndarray

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"overlap": mean(self.overlap_L), "same_first_choice": mean(self.first_L)}
        found["chance"] = mean(self.chance_L)
        found["overlap_by_domain"] = dict(zip(self.domains, plain(self.overlap_DL.mean(1)), strict=True))
        return plain(found)

    def by_layer(self) -> list[dict[str, Any]]:
        names = ("overlap", "low", "high", "chance", "first")
        return [{"saturation": plain({n: getattr(self, f"{n}_L")[l] for n in names})} for l in range(len(self.overlap_L))]


CARD = "layers-and-balancing.md#openmoe-measuring-context-independent-specialisation-and-dropping"


@register("statistics", "saturation", paper="2409.02060", card=CARD)
def saturation(trace: Trace, against: Trace, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> Saturation:
    """How far routing has settled: compare one checkpoint's choices with another's; see `Saturation` for the fields.

    Args:
        trace, against: traces of the same text through two checkpoints of one model.

    Raises:
        BadInput: the traces differ in layers, experts, tokenizer or text; the message names both and what differs.
    """
    comparable(trace, against)
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    layers = len(trace.layers)
    sums = np.zeros((bootstrap.units, layers, 4))  # agreed, chosen, same first choice, tokens with a first choice
    filled = np.zeros(layers)
    for block in rows.sequences(trace):
        mine = rows.distinct(block.experts_tLK)
        theirs = rows.distinct(rows.ids(against, block.rows))
        agreed = np.zeros(mine.shape[:2], np.int64)
        for i in range(mine.shape[2]):
            agreed += ((mine[..., i : i + 1] == theirs) & (mine[..., i : i + 1] >= 0)).any(2)
        one, two = first_choice(trace, block.rows, mine), first_choice(against, block.rows, theirs)
        chosen = (mine >= 0).sum(2)
        parts = np.stack([agreed, chosen, (one == two) & (one >= 0), one >= 0], -1)
        np.add.at(sums, bootstrap.unit_S[block.sequences], rows.per_sequence(parts.astype(np.int64), block.starts_s1))
        filled += (theirs >= 0).sum((0, 2))
    tokens = (rows.own_SL(trace) * trace.lengths_S[:, None]).sum(0)

    def shares(x: np.ndarray) -> np.ndarray:
        return x[..., ::2] / x[..., 1::2]

    low, high = bootstrap.interval(shares, sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = shares(sums.sum(0))
        each = [shares(sums[bootstrap.domain_U == d].sum(0))[:, 0] for d in range(len(trace.domains))]
        chance = filled / tokens / trace.experts_L
    by_domain = np.array(each).reshape(len(each), layers)
    return Saturation(
        value[:, 0], low[:, 0], high[:, 0], chance, value[:, 1], low[:, 1], high[:, 1], trace.domains, by_domain
    )  # fmt: skip


def first_choice(trace: Trace, where: slice, ids_tLK: np.ndarray) -> np.ndarray:
    """The expert of the largest weight, or of the first slot where no weights are recorded; -1 for none: [t, L]."""
    if trace.weights_TLK is None:
        return ids_tLK[..., 0]
    weights = np.where(ids_tLK >= 0, np.asarray(trace.weights_TLK[where], np.float32), -np.inf)
    return np.take_along_axis(ids_tLK, weights.argmax(2)[..., None], 2)[..., 0]


def comparable(trace: Trace, against: Trace) -> None:
    """Raises BadInput, naming both traces and what differs, unless they are of one text through models of one shape."""
    pair = f"{trace.name} and {against.name} cannot be compared"
    one, two = trace.header, against.header
    if len(one.layers) != len(two.layers):
        raise BadInput(f"{pair}: {len(one.layers)} layers against {len(two.layers)}")
    for a, b in zip(one.layers, two.layers, strict=True):
        if (a.experts, a.stream) != (b.experts, b.stream):
            raise BadInput(f"{pair}: {a.name} has {a.experts} experts, {b.name} has {b.experts}")
    if one.tokenizer and two.tokenizer and one.tokenizer != two.tokenizer:
        raise BadInput(f"{pair}: they were recorded with different tokenizers")
    if len(trace) != len(against) or not np.array_equal(trace.starts_S1, against.starts_S1):
        raise BadInput(f"{pair}: different texts, {len(trace):,} tokens against {len(against):,}, or other sequences")
    if trace.tokens_T is not None and against.tokens_T is not None:
        differ = np.flatnonzero(trace.tokens_T != against.tokens_T)
        if len(differ):
            raise BadInput(f"{pair}: different texts, their tokens differ from row {differ[0]} on")
