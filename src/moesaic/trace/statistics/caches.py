"""Choices as a cache sees them: every layer alone, or all layers of a stream as one pool of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap


class Pool(NamedTuple):
    """Which layers share a cache: experts in all, choices per token in all, and the layers' numbers."""

    experts: int
    top_k: int
    layers: tuple[int, ...]


class Block(NamedTuple):
    """Whole sequences as compiled loops read them; L counts caches, and K slots of all layers that share one."""

    experts_tLK: np.ndarray
    starts_s1: np.ndarray
    own_sL: np.ndarray
    unit_s: np.ndarray


def alone(trace: Trace) -> list[Pool]:
    """One cache per layer."""
    return [Pool(layer.experts, layer.top_k, (l,)) for l, layer in enumerate(trace.layers)]


def pooled(trace: Trace) -> list[Pool]:
    """One cache per stream, which all its layers share."""
    stream_L = rows.stream_L(trace)
    groups = [tuple(int(l) for l in np.flatnonzero(stream_L == z)) for z in range(len(trace.streams))]
    return [Pool(int(trace.experts_L[list(g)].sum()), int(rows.top_k_L(trace)[list(g)].sum()), g) for g in groups]


def blocks(trace: Trace, pools: list[Pool], bootstrap: Bootstrap) -> Iterator[Block]:
    """The trace, whole sequences at a time; within a pool, a layer's ids follow those of the layers before it."""
    own_SL = rows.own_SL(trace)
    own_SP = np.stack([own_SL[:, pool.layers[0]] for pool in pools], 1)
    for block in rows.sequences(trace):
        ids = rows.distinct(block.experts_tLK)
        if any(len(pool.layers) > 1 for pool in pools):
            ids = _together(ids, pools, trace.experts_L)
        yield Block(ids, block.starts_s1, own_SP[block.sequences], bootstrap.unit_S[block.sequences])


def _together(ids_tLK: np.ndarray, pools: list[Pool], experts_L: np.ndarray) -> np.ndarray:
    slots = ids_tLK.shape[2]
    out = np.full((len(ids_tLK), len(pools), slots * max(len(pool.layers) for pool in pools)), -1, np.int32)
    for p, pool in enumerate(pools):
        offset = 0
        for i, l in enumerate(pool.layers):
            part = ids_tLK[:, l]
            out[:, p, i * slots : (i + 1) * slots] = np.where(part >= 0, part + np.int32(offset), -1)
            offset += int(experts_L[l])
    return out


def sizes(pools: list[Pool], rho: np.ndarray) -> np.ndarray:
    """Cache sizes of rho active sets, [pools, C]: at least one expert, at most all."""
    wanted = np.rint(np.outer([pool.top_k for pool in pools], rho)).astype(np.int64)
    return np.clip(wanted, 1, np.array([pool.experts for pool in pools])[:, None])


def check_rho(rho: tuple[float, ...] | list[float]) -> np.ndarray:
    """Raises BadInput naming a cache size that is not above 0."""
    for value in rho:
        if not 0 < value < np.inf:
            raise BadInput(f"rho {value}: a cache size, in active sets of experts, must be above 0")
    if not len(rho):
        raise BadInput("rho: name at least one cache size, in active sets of experts")
    return np.array(rho, float)
