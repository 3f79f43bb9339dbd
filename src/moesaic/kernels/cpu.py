"""The CPU path for inference: blocks of a few hundred pairs, weights read in the fastest form there is.

Where the weights come from is a store: `Plain` reads the stacked tensors as they are, `PackedBank` (packing.py) holds
oneDNN's own layout. What makes it fast, by size:

- few rows per expert: reading the weights is everything, hence one compiled pass (few_rows.py), or packing without it;
- many rows in bf16 on a CPU with AVX-512's product of bf16 pairs: one compiled pass as well (many_rows.py), or:
- one token: no sort, no scatter, two products per hit expert;
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
from moesaic.kernels import few_rows, many_rows
from moesaic.kernels.combine import TokenOrder, sum_per_token
from moesaic.kernels.memory import scratch
from moesaic.kernels.packing import PackedBank, packed_for
from moesaic.kernels.products import Span, blocks, hit_spans, rows_by_weight
from moesaic.kernels.slots import bounds_of
from moesaic.kernels.weights import Form, Weights, compute_dtype


class Store(Protocol):
    """Where the weights of a bank come from: products of a block's sorted rows with their own expert's matrix."""

    dtype: torch.dtype

    def ready(self, experts: Iterable[int]) -> None: ...
    def first(self, x_sD: Tensor, spans: list[Span]) -> Tensor: ...
    def second(self, a_sI: Tensor, spans: list[Span]) -> Tensor: ...


class Plain:
    """The stacked tensors as they are, cast expert by expert where the compute dtype differs."""

    def __init__(self, weights: Weights, dtype: torch.dtype):
        self.dtype = dtype
        self.gate_up_EHD, self.down_EDI = weights.gate_up_EHD, weights.down_EDI

    def ready(self, experts: Iterable[int]) -> None:
        pass

    def first(self, x_sD: Tensor, spans: list[Span]) -> Tensor:
        return rows_by_weight(x_sD, self.gate_up_EHD, None, spans)

    def second(self, a_sI: Tensor, spans: list[Span]) -> Tensor:
        return rows_by_weight(a_sI, self.down_EDI, None, spans)


@register("kernels", "cpu", card="benchmarks.md#moe-layer", devices="cpu", training=False)
def cpu(x_TD: Tensor, dispatch: Dispatch, weights: Weights) -> Tensor:
    """Inference on a CPU: one compiled pass where there is one, else cache-sized blocks."""
    return best(x_TD, dispatch, weights)


def best(x_TD: Tensor, dispatch: Dispatch, weights: Weights, packed: PackedBank | None = None) -> Tensor:
    """The fastest way for so many rows; without `packed`, weights are packed only within the budget granted."""
    dtype = compute_dtype(x_TD, weights)
    spans = hit_spans(bounds_of(dispatch))
    if spans and x_TD.device.type == "cpu":
        for compiled in (many_rows, few_rows):
            if compiled.fits(weights, dtype, spans):
                return compiled.run(x_TD, dispatch, weights, spans)
    return run(x_TD, dispatch, weights.form, packed or packed_for(weights, dtype) or Plain(weights, dtype), spans)


def run(x_TD: Tensor, dispatch: Dispatch, form: Form, store: Store, spans: list[Span] | None = None) -> Tensor:
    """y [T, D] in x's dtype; `form` says what happens around the products, `store` computes them. No gradients.

    `spans` are the hit experts, where the caller has found them already.
    """
    if x_TD.device.type != "cpu":
        raise BadInput(f"the cpu kernel got a tensor on {x_TD.device}")
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        spans = hit_spans(bounds_of(dispatch)) if spans is None else spans
        if not spans:
            return torch.zeros_like(x_TD)
        store.ready([e for e, _, _ in spans])
        x_cast_TD = x_TD.to(store.dtype)
        wide = torch.promote_types(store.dtype, torch.float32)
        if dispatch.tokens == 1:  # every pair reads the same row: nothing to gather, nothing to put back in order
            y_SD = _block(x_cast_TD.repeat(spans[-1][2], 1), spans, form, store)
            return torch.mv(y_SD.to(wide).T, dispatch.weight_S.to(wide)).to(x_TD.dtype).unsqueeze(0)
        y_SD = scratch("pairs", spans[-1][2], x_TD.shape[1], wide)
        for block in blocks(spans, x_TD.device):
            here = slice(block[0][1], block[-1][2])
            y_SD[here] = _block(x_cast_TD.index_select(0, dispatch.token_S[here]), block, form, store)
        order = TokenOrder.of(dispatch.token_S, dispatch.tokens)
        return sum_per_token(y_SD, dispatch.weight_S, order, x_TD.dtype)


def _block(x_sD: Tensor, block: list[Span], form: Form, store: Store) -> Tensor:
    h_sH = _add_bias(store.first(x_sD, block), form.gate_up_bias_EH, block)
    if form.swiglu:
        gate_sI, up_sI = h_sH.chunk(2, dim=1)
        a_sI = silu(gate_sI).mul_(up_sI)
    else:
        a_sI = form.activate(h_sH).contiguous()
    y_sD = _add_bias(store.second(a_sI, block), form.down_bias_ED, block)
    return y_sD if form.post is None else form.post(y_sD)


def _add_bias(rows_sB: Tensor, bias_EB: Tensor | None, block: list[Span]) -> Tensor:
    if bias_EB is None:
        return rows_sB
    expert_s = torch.tensor([e for e, start, end in block for _ in range(start, end)])
    return rows_sB.add_(bias_EB.to(rows_sB.dtype).index_select(0, expert_s))
