"""Fixed choices of the experts that stay on the device: by count, the same number per layer, whole layers, or at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.policies.allocation import split

if TYPE_CHECKING:
    from moesaic.trace.policies.policy import Shape

Kind = Literal["frequency", "uniform", "front_loading", "back_loading", "random"]


def mask(
    kind: Kind,
    capacity_bytes: int,
    shape: Shape,
    counts_LE: np.ndarray | None = None,
    seed: int = 42,
) -> np.ndarray:
    """Which experts [L, E] are resident within a capacity.

    frequency: the most used of all layers (with unequal sizes the most used that still fit, in order); uniform: the same
    share of each layer, its most used where counts are given, else its first, as far as they fit; front_loading and
    back_loading: whole layers from the first or the last on; random: any, by seed. Raises BadInput for frequency without
    counts.
    """
    layers, experts = shape.sizes_LE.shape
    real_LE = np.arange(experts) < shape.experts_L[:, None]
    if kind == "frequency":
        if counts_LE is None:
            raise BadInput("mask 'frequency' needs counts of earlier routing")
        order = np.lexsort((np.tile(np.arange(experts), layers), np.repeat(np.arange(layers), experts), -counts_LE.ravel()))
    elif kind == "uniform":
        counts_LE = np.zeros((layers, experts)) if counts_LE is None else counts_LE
        if capacity_bytes >= shape.total_bytes:
            return real_LE
        left_L = split(capacity_bytes, shape.experts_L, shape.bytes_L) * shape.bytes_L
        best_LE = np.argsort(np.where(real_LE, -counts_LE, np.inf), axis=1, kind="stable")
        chosen = np.zeros((layers, experts), bool)
        for layer, left in enumerate(left_L.tolist()):
            for e in best_LE[layer, : shape.experts_L[layer]]:
                if shape.sizes_LE[layer, e] <= left:
                    chosen[layer, e] = True
                    left -= int(shape.sizes_LE[layer, e])
        return chosen
    elif kind in ("front_loading", "back_loading"):
        order = np.arange(layers * experts)
        if kind == "back_loading":
            order = order.reshape(layers, experts)[::-1].ravel()
    elif kind == "random":
        order = np.random.default_rng(seed).permutation(layers * experts)
    else:
        raise BadInput(f"mask {kind!r}: one of frequency, uniform, front_loading, back_loading, random")
    return _fit(order, real_LE, capacity_bytes, shape.sizes_LE, whole=kind == "back_loading")


def _fit(order: np.ndarray, real_LE: np.ndarray, capacity: int, bytes_LE: np.ndarray, whole: bool) -> np.ndarray:
    """Take experts in order while they fit; `whole`: only layers that fit entirely."""
    chosen = np.zeros_like(real_LE)
    if whole:
        for layer in reversed(range(len(real_LE))):
            size = int(bytes_LE[layer].sum())
            if size > capacity:
                break
            chosen[layer] = real_LE[layer]
            capacity -= size
        return chosen
    order = order[real_LE.ravel()[order]]
    sizes = bytes_LE.ravel()[order]
    if (sizes == sizes[0]).all():
        chosen.ravel()[order[: int(capacity // sizes[0])]] = True
        return chosen
    for at, size in zip(order, sizes, strict=True):
        if size <= capacity:
            chosen.ravel()[at] = True
            capacity -= int(size)
    return chosen
