"""Counts of choices per unit, layer and expert, from a trace or from tables that somebody else counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap

Counts = np.ndarray | Mapping[str, np.ndarray]
"""Choices [L, E], or one such table per domain."""


class Counted(NamedTuple):
    """Choices per layer and expert.

    Attributes:
        counts_ULE: by unit of resampling (of tables: one unit). counts_DLE: by domain.
        tokens_UL: rows that each layer saw, by unit; of tables None. real_LE: which cells are experts.
        bootstrap: None for tables, which say nothing about sequences.
    """

    counts_ULE: np.ndarray
    counts_DLE: np.ndarray
    tokens_UL: np.ndarray | None
    real_LE: np.ndarray
    domains: tuple[str, ...]
    bootstrap: Bootstrap | None


def count(source: Trace | Counts, resamples: int = 0, confidence: float = 0.95, seed: int = 0) -> Counted:
    """Count a trace's filled slots, or check tables of counts. Raises BadInput for shapes or values that are no counts."""
    if not isinstance(source, Trace):
        return _tables(source)
    bootstrap = Bootstrap(source, resamples, confidence, seed)
    layers, experts = len(source.layers), source.num_experts
    rows.check_table("counting experts", bootstrap.units, layers, experts)
    counts = np.zeros((bootstrap.units, layers * experts), np.int64)
    tokens = np.zeros((bootstrap.units, layers), np.int64)
    np.add.at(tokens, bootstrap.unit_S, source.lengths_S[:, None] * rows.own_SL(source))
    offset_LK = (np.arange(layers) * experts)[None, :, None]
    for block in rows.sequences(source):
        unit_t = bootstrap.unit_S[block.sequences][block.sequence_t]
        held, unit_t = np.unique(unit_t, return_inverse=True)
        index = block.experts_tLK + offset_LK + (unit_t * (layers * experts))[:, None, None]
        flat = np.bincount(index[block.experts_tLK >= 0], minlength=len(held) * layers * experts)
        counts[held] += flat.reshape(len(held), -1)
    counts_ULE = counts.reshape(-1, layers, experts)
    domains = [counts_ULE[bootstrap.domain_U == d].sum(0) for d in range(len(source.domains))]
    counts_DLE = np.stack(domains) if domains else np.zeros((0, layers, experts), np.int64)
    return Counted(counts_ULE, counts_DLE, tokens, rows.real_LE(source), source.domains, bootstrap)


def _tables(source: Counts) -> Counted:
    tables = dict(source) if isinstance(source, Mapping) else {"": source}
    if not tables:
        raise BadInput("no table of counts was given")
    arrays = {name: np.asarray(table) for name, table in tables.items()}
    shape = next(iter(arrays.values())).shape
    for name, array in arrays.items():
        label = f"the counts of {name!r}" if name else "the counts"
        if array.ndim != 2 or array.shape != shape:
            raise BadInput(f"{label} must be [layers, experts], one shape for every domain, given {list(array.shape)}")
        if not array.size or (array < 0).any() or not np.isfinite(array).all() or not array.any():
            raise BadInput(f"{label} must be numbers from 0 up, and not all 0")
    counts_DLE = np.stack(list(arrays.values())).astype(np.int64)
    named = () if list(arrays) == [""] else tuple(arrays)
    return Counted(counts_DLE.sum(0, keepdims=True), counts_DLE[: len(named)], None, np.ones(shape, bool), named, None)


def share(counts: np.ndarray) -> np.ndarray:
    """Counts along the last axis as shares of their sum, NaN where there are none."""
    total = counts.sum(-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
