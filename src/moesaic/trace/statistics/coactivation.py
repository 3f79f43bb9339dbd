"""Co-activation: which experts of a layer are chosen together by one token, against chance."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.result import Statistic, plain


@dataclass(frozen=True)
class Coactivation(Statistic):
    """Per layer and pair of experts; NaN where an expert is never chosen.

    Attributes:
        together_LEE: tokens that choose both (symmetric); on the diagonal, tokens that choose the expert. tokens_L: all.
        conditional_LEE: share of the tokens of expert a (first axis) that also choose b; NaN on the diagonal.
        lift_LEE: tokens that choose both, over what independent choices with the same loads would give; 1 is chance, but
            for choices without repetition chance is (K - 1) E / (K (E - 1)), which `chance_L` holds.
    """

    together_LEE: np.ndarray
    tokens_L: np.ndarray
    conditional_LEE: np.ndarray
    lift_LEE: np.ndarray
    chance_L: np.ndarray

    def strongest(self, layer: int, pairs: int = 5) -> list[tuple[int, int, float]]:
        """The pairs (a, b, share of a's tokens that also choose b) that go together most, a < b either way round."""
        table = np.nan_to_num(self.conditional_LEE[layer], nan=-1)
        best = np.triu(np.maximum(table, table.T), 1)
        order = np.argsort(best, axis=None, kind="stable")[::-1][:pairs]
        found = [(int(i // len(table)), int(i % len(table)), float(best.flat[i])) for i in order]
        return [pair for pair in found if pair[2] > 0]

    def summary(self) -> dict[str, Any]:
        return plain({"largest_lift": largest(self.lift_LEE), "chance_lift": largest(self.chance_L)})

    def by_layer(self) -> list[dict[str, Any]]:
        found = []
        for l in range(len(self.tokens_L)):
            pairs = [{"experts": [a, b], "share": value} for a, b, value in self.strongest(l)]
            found.append({"coactivation": plain({"strongest": pairs, "chance_lift": self.chance_L[l]})})
        return found


def largest(table: np.ndarray) -> float:
    return float(np.nanmax(table)) if np.isfinite(table).any() else np.nan


@register("statistics", "coactivation", paper="2409.02060", card="serving-and-scale.md#c-placement-across-devices")
def coactivation(trace: Trace) -> Coactivation:
    """Count pairs of experts in the same token and layer; see `Coactivation` for the fields.

    Raises:
        BadInput: an empty trace, or more experts than a table of pairs can hold.
    """
    layers, experts = len(trace.layers), trace.num_experts
    rows.check_table("co-activation", layers, experts, experts)
    offset_L = np.arange(layers, dtype=np.int64)[None] * experts**2
    flat = np.zeros(layers * experts**2, np.int64)
    for block in rows.sequences(trace):
        ids = rows.distinct(block.experts_tLK).astype(np.int64)
        for i in range(ids.shape[2]):
            one = ids[..., i]
            flat += np.bincount((one * (experts + 1) + offset_L)[one >= 0], minlength=len(flat))
        for i, j in combinations(range(ids.shape[2]), 2):
            one, two = ids[..., i], ids[..., j]
            held = (one >= 0) & (two >= 0)
            flat += np.bincount((one * experts + two + offset_L)[held], minlength=len(flat))
    together = flat.reshape(layers, experts, experts)
    diagonal = np.einsum("lee->le", together).copy()
    together = together + together.swapaxes(1, 2)
    np.einsum("lee->le", together)[:] = diagonal
    tokens_L = (rows.own_SL(trace) * trace.lengths_S[:, None]).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        conditional = together / diagonal[:, :, None]
        expected = diagonal[:, :, None] * diagonal[:, None] / tokens_L[:, None, None]
        lift = np.where(expected > 0, together / expected, np.nan)
        k_L, e_L = diagonal.sum(1) / tokens_L, trace.experts_L
        chance = np.where(k_L > 0, (k_L - 1) * e_L / (k_L * (e_L - 1)), np.nan)
    for table in (conditional, lift):
        np.einsum("lee->le", table)[:] = np.nan
    return Coactivation(together, tokens_L, conditional, lift, chance)
