"""Affinity: transitions between experts of consecutive layers, and how many tokens could stay where they are (ExFlow).

A token that chooses K experts at layer l and K' at the next makes K K' transitions of weight 1/(K K'): every token adds 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.result import Statistic, plain

Pairs = np.ndarray | Mapping[str, np.ndarray]
"""Transitions [A, E, E] between A pairs of layers, or one such table per domain (they are added up)."""


@dataclass(frozen=True)
class Affinity(Statistic):
    """Per pair of consecutive layers; A counts pairs.

    Attributes:
        pair_A2: numbers of the two layers. transitions_AEE: R, tokens that use e1 and then e2 (weights 1/(K K')).
        conditional_AEE: P(e2 | e1), NaN where e1 is never used.
        stay_AE: share of tokens whose next expert is among the n = 1..E likeliest successors of the present one: what can
            stay on its device when each expert's best n successors are placed with it. The best that a placement with n
            experts of the next layer per device could do; uniform transitions give n/E.
        null_stay_AE: the same for transitions that keep the two loads but no affinity, counting noise included.
        mutual_bits_A: mutual information between the experts of the two layers. null_bits_A: that of the null, its bias.
        next_bits_A: entropy of the next layer's load, what the mutual information would be for certain transitions.
    """

    pair_A2: np.ndarray
    transitions_AEE: np.ndarray
    conditional_AEE: np.ndarray
    stay_AE: np.ndarray
    null_stay_AE: np.ndarray
    mutual_bits_A: np.ndarray
    null_bits_A: np.ndarray
    next_bits_A: np.ndarray

    def summary(self) -> dict[str, Any]:
        if not len(self.pair_A2):
            return {"pairs": 0}
        found: dict[str, Any] = {"pairs": len(self.pair_A2)}
        found["best_successor_share"] = self.stay_AE[:, 0].mean()
        found["best_successor_share_null"] = self.null_stay_AE[:, 0].mean()
        found["stay_share_by_devices"] = {str(g): self.stay(g).mean() for g in (2, 4, 8)}
        found["stay_share_null_by_devices"] = {str(g): self.stay(g, null=True).mean() for g in (2, 4, 8)}
        found["mutual_bits"], found["mutual_bits_null"] = self.mutual_bits_A.mean(), self.null_bits_A.mean()
        return plain(found)

    def stay(self, devices: int, null: bool = False) -> np.ndarray:
        """Bound on the share of tokens that stay when each of `devices` holds E/devices experts of a layer, [A]."""
        table = self.null_stay_AE if null else self.stay_AE
        experts = np.isfinite(table).sum(1)
        return table[np.arange(len(table)), np.maximum(-(-experts // devices), 1) - 1]

    def by_layer(self) -> list[dict[str, Any]]:
        layers = int(self.pair_A2.max(initial=0)) + 1
        found: list[dict[str, Any]] = [{} for _ in range(layers)]
        for a, (layer, follower) in enumerate(self.pair_A2):
            values = {"next_layer": follower, "best_successor_share": self.stay_AE[a, 0]}
            values |= {"best_successor_share_null": self.null_stay_AE[a, 0], "mutual_bits": self.mutual_bits_A[a]}
            found[layer]["affinity"] = plain(values | {"mutual_bits_null": self.null_bits_A[a]})
        return found


@register(
    "statistics",
    "affinity",
    paper="2401.08383",
    card="serving-and-scale.md#exflow-inter-layer-affinity-placement-one-all-to-all",
)
def affinity(source: Trace | Pairs, *, seed: int = 0) -> Affinity:
    """Transitions, stay curves and mutual information; see `Affinity` for the fields.

    Args:
        source: a trace, or tables of pair counts. seed: of the null, which pairs the choices of different tokens (of a
            trace), or draws as many pairs from the two loads (of tables).

    Raises:
        BadInput: an empty trace, too many experts for tables of pairs, or tables that are no counts.
    """
    rng = np.random.default_rng(seed)
    if isinstance(source, Trace):
        pairs, tables, null = _count(source, rng)
        experts_A2 = source.experts_L[pairs]
    else:
        tables = _tables(source)
        pairs = np.stack([np.arange(len(tables)), np.arange(1, len(tables) + 1)], 1)
        null = np.stack([_draw(table, rng) for table in tables])
        experts_A2 = np.full(pairs.shape, tables.shape[1])
    bits, following = _mutual(tables)
    total = tables.sum(2, keepdims=True)
    conditional = np.divide(tables, total, out=np.full(tables.shape, np.nan), where=total > 0)
    stay, null_stay = _stay(tables, experts_A2), _stay(null, experts_A2)
    return Affinity(pairs, tables, conditional, stay, null_stay, bits, _mutual(null)[0], following)


def _count(trace: Trace, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    stream_L = rows.stream_L(trace)
    followers = [
        (l, int(n[0])) for l in range(len(stream_L)) if len(n := np.flatnonzero(stream_L[l + 1 :] == stream_L[l]) + l + 1)
    ]
    pairs, experts = np.array(followers, np.int64).reshape(-1, 2), trace.num_experts
    rows.check_table("affinity", 2 * len(pairs), experts, experts)
    tables, null = (np.zeros((len(pairs), experts**2)) for _ in range(2))
    own_SL, other_T = rows.own_SL(trace), _shuffled(trace, rng)
    for block in rows.sequences(trace):
        ids, others = rows.distinct(block.experts_tLK), rows.distinct(rows.ids(trace, other_T[block.rows]))
        own_tL = own_SL[block.sequences][block.sequence_t]
        for a, (l, n) in enumerate(pairs):
            mine = own_tL[:, l]
            one, two, other = (x if mine.all() else x[mine] for x in (ids[:, l], ids[:, n], others[:, n]))
            _add(tables[a], one, two, experts)
            _add(null[a], one, other, experts)
    return pairs, tables.reshape(-1, experts, experts), null.reshape(-1, experts, experts)


def _shuffled(trace: Trace, rng: np.random.Generator) -> np.ndarray:
    """Another row of the same stream for every row, each used once."""
    other_T = np.arange(len(trace))
    stream_T = np.repeat(trace.stream_S, trace.lengths_S)
    for stream in np.unique(stream_T):
        rows_of = np.flatnonzero(stream_T == stream)
        other_T[rows_of] = rng.permutation(rows_of)
    return other_T


def _add(flat: np.ndarray, one_tK: np.ndarray, two_tK: np.ndarray, experts: int) -> None:
    """Add each token's transitions; tokens are grouped by their number of filled slots, so that weights are constants."""
    filled_one, filled_two = (one_tK >= 0).sum(1), (two_tK >= 0).sum(1)
    product = filled_one * filled_two
    for size in np.unique(product[product > 0]):
        held = product == size
        a, b = (one_tK, two_tK) if held.all() else (one_tK[held], two_tK[held])
        index = a[:, :, None].astype(np.int64) * experts + b[:, None]
        full = size == one_tK.shape[1] * two_tK.shape[1]
        index = index.ravel() if full else index[(a >= 0)[:, :, None] & (b >= 0)[:, None]]
        flat += np.bincount(index, minlength=len(flat)) / size


def _tables(source: Pairs) -> np.ndarray:
    arrays = [np.asarray(table, float) for table in (source.values() if isinstance(source, Mapping) else [source])]
    if not arrays:
        raise BadInput("no table of pairs was given")
    for array in arrays:
        if array.ndim != 3 or array.shape[1] != array.shape[2] or array.shape != arrays[0].shape:
            raise BadInput(f"pairs must be [pairs of layers, experts, experts], one shape for all, given {list(array.shape)}")
        if not array.size or not np.isfinite(array).all() or (array < 0).any() or not array.any():
            raise BadInput("pairs must be numbers from 0 up, and not all 0")
    return np.sum(arrays, 0)


def _draw(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    total = table.sum()
    independent = np.outer(table.sum(1), table.sum(0)) / max(total**2, 1)
    return (
        rng.multinomial(round(total), independent.ravel() / max(independent.sum(), 1e-300)).reshape(table.shape).astype(float)
    )


def _stay(tables: np.ndarray, experts_A2: np.ndarray) -> np.ndarray:
    total = tables.sum((1, 2))
    curve = np.cumsum(np.sort(tables, 2)[..., ::-1].sum(1), 1)
    curve = np.divide(curve, total[:, None], out=np.full(curve.shape, np.nan), where=total[:, None] > 0)
    curve[np.arange(curve.shape[1])[None] >= experts_A2[:, 1:]] = np.nan
    return curve


def _mutual(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mutual information of each table, and entropy of its second axis, in bits."""
    total = tables.sum((1, 2), keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = tables / total
    first, second, joint = (_entropy(x) for x in (p.sum(2), p.sum(1), p.reshape(len(p), p.shape[1] ** 2)))
    return first + second - joint, second


def _entropy(p: np.ndarray) -> np.ndarray:
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(-1)
