"""Products of sorted rows with their own expert's matrix, one expert at a time: the unpacked building blocks.

Shape legend: S routed pairs, A input width, B output width, E experts. `bounds` is offsets_E1 as a Python list, so
that a host synchronisation happens once per layer. Weights are [E, B, A], any strides, any dtype: a hit expert is
cast when it is used, an expert without pairs is never read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def hit_experts(bounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of every expert that owns pairs."""
    for e in range(len(bounds) - 1):
        if bounds[e] < bounds[e + 1]:
            yield e, bounds[e], bounds[e + 1]


def rows_by_weight(rows_SA: Tensor, weight_EBA: Tensor, bias_EB: Tensor | None, bounds: list[int]) -> Tensor:
    """rows @ weight[e].T + bias[e], as [S, B] in the dtype of the rows."""
    out_SB = rows_SA.new_empty(rows_SA.shape[0], weight_EBA.shape[1])
    for e, start, end in hit_experts(bounds):
        torch.mm(rows_SA[start:end], weight_EBA[e].to(rows_SA.dtype).T, out=out_SB[start:end])
        if bias_EB is not None:
            out_SB[start:end] += bias_EB[e].to(rows_SA.dtype)
    return out_SB


def grad_of_rows(grad_SB: Tensor, weight_EBA: Tensor, bounds: list[int]) -> Tensor:
    """grad @ weight[e], as [S, A]."""
    out_SA = grad_SB.new_empty(grad_SB.shape[0], weight_EBA.shape[2])
    for e, start, end in hit_experts(bounds):
        torch.mm(grad_SB[start:end], weight_EBA[e].to(grad_SB.dtype), out=out_SA[start:end])
    return out_SA


def grad_of_weight(grad_SB: Tensor, rows_SA: Tensor, weight_EBA: Tensor, bounds: list[int]) -> Tensor:
    """grad[e].T @ rows[e], as [E, B, A] in the weight's dtype and strides. Only experts without pairs are zero-filled:
    a hit expert's slice is written once, by its product."""
    d_weight = torch.empty_like(weight_EBA)
    same = d_weight.dtype == rows_SA.dtype
    for e in range(weight_EBA.shape[0]):
        start, end = bounds[e], bounds[e + 1]
        if start == end:
            d_weight[e].zero_()
        elif same and d_weight[e].is_contiguous():
            torch.mm(grad_SB[start:end].T, rows_SA[start:end], out=d_weight[e])
        elif same:  # transposed storage: write the transposed product, straight into place
            torch.mm(rows_SA[start:end].T, grad_SB[start:end], out=d_weight[e].T)
        else:
            d_weight[e] = torch.mm(grad_SB[start:end].T, rows_SA[start:end])
    return d_weight


def grad_of_bias(grad_SB: Tensor, bias_EB: Tensor, bounds: list[int]) -> Tensor:
    """Row sums per expert, accumulated in fp32 or better."""
    wide = torch.promote_types(grad_SB.dtype, torch.float32)
    d_bias = torch.zeros_like(bias_EB)
    for e, start, end in hit_experts(bounds):
        d_bias[e] = grad_SB[start:end].sum(0, dtype=wide)
    return d_bias
