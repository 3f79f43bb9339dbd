"""The CPU path for inference: blocks of a few hundred pairs, weights read in the fastest form there is.

Where the weights come from is a store: `Plain` reads the stacked tensors as they are, `PackedBank` (packing.py) holds
oneDNN's own layout, `QuantizedBank` (quantized.py) int8 or int4. What makes it fast, by size:

- one token: no sort, no scatter, two products per hit expert;
- few rows per expert: reading the weights is everything, hence packing;
- many rows: blocks keep the inner rows in cache, the activation runs on a whole block (per expert it would be too
  small to share between cores), outputs go to scratch that is kept, and the combine is one pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.memory import scratch
from moesaic.kernels.packing import packed_for
from moesaic.kernels.products import blocks, hit_spans, product
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Weights, compute_dtype


class Store(Protocol):
    """Where the weights of a bank come from. `first` maps rows [s, D] to [s, H], `second` [s, I] to [s, D]."""

    dtype: torch.dtype

    def ready(self, experts: Iterable[int]) -> None: ...
    def first(self, e: int, x_sD: Tensor, bias_H: Tensor | None) -> Tensor: ...
    def second(self, e: int, a_sI: Tensor, bias_D: Tensor | None) -> Tensor: ...


class Plain:
    """The stacked tensors as they are, cast expert by expert where the compute dtype differs."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self.dtype = dtype
        self.gate_up_EHD, self.down_EDI = weights.gate_up_EHD, weights.down_EDI

    def ready(self, experts: Iterable[int]) -> None:
        pass

    def first(self, e: int, x_sD: Tensor, bias_H: Tensor | None) -> Tensor:
        return product(x_sD, self.gate_up_EHD[e].to(self.dtype), bias_H)

    def second(self, e: int, a_sI: Tensor, bias_D: Tensor | None) -> Tensor:
        return product(a_sI, self.down_EDI[e].to(self.dtype), bias_D)


@register("kernels", "cpu", card="benchmarks.md#moe-layer", devices="cpu", training=False)
def cpu(x_TD: Tensor, dispatch: Dispatch, weights: Weights) -> Tensor:
    """Inference on a CPU in cache-sized blocks, from packed weights where packing is allowed."""
    dtype = compute_dtype(x_TD, weights)
    return run(x_TD, dispatch, weights, packed_for(weights, dtype) or Plain(weights, dtype))


def run(x_TD: Tensor, dispatch: Dispatch, weights: Weights, store: Store) -> Tensor:
    """y [T, D] in x's dtype; `weights` says how (activation, biases, hooks), `store` gives the products."""
    if x_TD.device.type != "cpu":
        raise BadInput(f"the cpu kernel got a tensor on {x_TD.device}")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        spans = hit_spans(bounds_of(dispatch))
        if not spans:
            return torch.zeros_like(x_TD)
        store.ready([e for e, _, _ in spans])
        x_cast_TD = x_TD.to(store.dtype)
        wide = torch.promote_types(store.dtype, torch.float32)
        y_SD = scratch("pairs", spans[-1][2], x_TD.shape[1], wide)
        for block in blocks(spans, x_TD.device):
            here = slice(block[0][1], block[-1][2])
            y_SD[here] = _block(x_cast_TD.index_select(0, dispatch.token_S[here]), block, weights, store)
        if dispatch.tokens == 1:
            return torch.mv(y_SD.T, dispatch.weight_S.to(wide)).to(x_TD.dtype).unsqueeze(0)
        order = TokenOrder.of(dispatch.token_S, dispatch.tokens)
        return sum_per_token(y_SD, dispatch.weight_S, order, x_TD.dtype)


def _block(x_sD: Tensor, block: list[tuple[int, int, int]], weights: Weights, store: Store) -> Tensor:
    sizes = [end - start for _, start, end in block]
    experts = [e for e, _, _ in block]
    bias_EH, bias_ED = weights.gate_up_bias_EH, weights.down_bias_ED
    h_sH = torch.cat(
        [
            store.first(e, rows, None if bias_EH is None else bias_EH[e].to(store.dtype))
            for e, rows in zip(experts, x_sD.split(sizes), strict=True)
        ]
    )
    if weights.swiglu:
        gate_sI, up_sI = h_sH.chunk(2, dim=1)
        a_sI = silu(gate_sI).mul_(up_sI)
    else:
        a_sI = weights.activate(h_sH)
    y_sD = torch.cat(
        [
            store.second(e, rows, None if bias_ED is None else bias_ED[e].to(store.dtype))
            for e, rows in zip(experts, a_sI.split(sizes), strict=True)
        ]
    )
    return y_sD if weights.post is None else weights.post(y_sD)
