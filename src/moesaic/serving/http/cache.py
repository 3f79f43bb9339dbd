"""Rows of a batch that join and leave a transformers cache: keys and values are padded on the left and masked.

Prompts are read alone and unpadded, and a step feeds one token per row, so padding exists only in keys and values: no
padding token is ever routed. Layers of a kind not listed here cannot share a cache; their rows run side by side instead.
B rows, H heads, L positions, W a sliding window, d head width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MERGEABLE = (DynamicLayer, DynamicSlidingWindowLayer)


def mergeable(cache: Any) -> bool:
    """Whether every layer is plain keys and values; subclasses carry more state and are not."""
    layers = getattr(cache, "layers", None)
    return layers is not None and all(type(layer) in MERGEABLE and not getattr(layer, "record_past", False) for layer in layers)


def merge(first: Any, second: Any, first_length: int, second_length: int) -> Any:
    """`first` with the rows of `second` after its own; both are used up. Lengths are those of their padded rows."""
    length = max(first_length, second_length)
    for mine, other in zip(first.layers, second.layers, strict=True):
        if not mine.is_initialized:  # a layer that reads another's keys keeps none
            continue
        size = _stored(mine, length)
        mine.keys = torch.cat([_widen(mine.keys, size), _widen(other.keys, size)])
        mine.values = torch.cat([_widen(mine.values, size), _widen(other.values, size)])
        if isinstance(mine, DynamicSlidingWindowLayer):
            mine.cumulative_length = length
    return first


def select(cache: Any, rows: list[int], length: int) -> Any:
    """Only these rows, in this order, and only their last `length` positions."""
    index: Tensor | None = None
    for layer in cache.layers:
        if not layer.is_initialized:
            continue
        if index is None:
            index = torch.tensor(rows, device=layer.keys.device)
        size = _stored(layer, length)
        at = layer.keys.shape[-2] - size
        layer.keys, layer.values = layer.keys[index, :, at:], layer.values[index, :, at:]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length
    return cache


def mark(cache: Any) -> list[tuple[Any, ...]]:
    """Where a mergeable cache stands now, for `rewind`: nothing is copied."""
    return [
        (layer.keys, layer.values, layer.cumulative_length)  # a window forgets: what it had must be kept
        if isinstance(layer, DynamicSlidingWindowLayer)
        else (layer.keys.shape[-2] if layer.is_initialized else 0,)
        for layer in cache.layers
    ]


def rewind(cache: Any, marked: list[tuple[Any, ...]]) -> None:
    """Take back what a pass that was broken off has put into some layers."""
    for layer, before in zip(cache.layers, marked, strict=True):
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.keys, layer.values, layer.cumulative_length = before
        elif layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., : before[0], :], layer.values[..., : before[0], :]


def some_rows(cache: Any, rows: list[int], length: int) -> Any:
    """A mergeable cache of these rows' last `length` positions; the given one stays as it is."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return select(own, rows, length)


def duplicate(cache: Any) -> Any:
    """A cache with contents of its own, whatever its kind."""
    return copy.deepcopy(cache)


def _stored(layer: Any, length: int) -> int:
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def _widen(states_BHLd: Tensor, size: int) -> Tensor:
    missing = size - states_BHLd.shape[-2]
    return pad(states_BHLd, (0, 0, missing, 0)) if missing > 0 else states_BHLd
