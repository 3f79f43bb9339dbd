"""Products of sorted rows with their own expert's matrix, one expert at a time: the unpacked building blocks.

Shape legend: S routed pairs, A input width, B output width, E experts. A span is (expert, start, end): the expert
owns pairs start : end. Weights are [E, B, A], any strides, any dtype: a hit expert is cast when it is used, an expert
without pairs is never read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.kernels.memory import prefer_huge_pages

_onednn = torch.ops.mkldnn._linear_pointwise.default

Span = tuple[int, int, int]

CPU_BLOCK_ROWS = 512
"""Pairs handled between one gather and the next on a CPU. The inner rows of a block (512 x 2I) stay in cache, and its
buffers stay small enough that the allocator reuses them: fresh pages cost 5 us each on the machines measured, more
than the arithmetic done on them. Beyond a few hundred rows nothing is gained."""


def hit_spans(bounds: list[int]) -> list[Span]:
    """A span for every expert that owns pairs; `bounds` is offsets_E1 as a list."""
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]]


def blocks(spans: list[Span], device: torch.device) -> Iterator[list[Span]]:
    """Consecutive spans in groups of about CPU_BLOCK_ROWS pairs on a CPU; all of them elsewhere."""
    if device.type != "cpu":
        yield spans
        return
    block: list[Span] = []
    for span in spans:
        if block and span[2] - block[0][1] > CPU_BLOCK_ROWS:
            yield block
            block = []
        block.append(span)
    if block:
        yield block


def onednn_is_faster(rows_sA: Tensor, weight_BA: Tensor) -> bool:
    """Whether oneDNN's own entry point beats PyTorch's matmul on an unpacked matrix: in fp32 on a CPU, where it stands
    in for MKL. Measured on AMD at 1,024 x 1,024: twice the speed at one row, 1.4x at sixty; its fixed cost of 15 us
    shows below some 256 x 256. In bf16 both end in the same kernel."""
    size = weight_BA.shape[0] * weight_BA.shape[1]
    large = size >= 1 << 15 and size * rows_sA.shape[0] >= 1 << 17
    return large and rows_sA.dtype == torch.float32 and rows_sA.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _grouped(rows_SA: Tensor, weight_EBA: Tensor, spans: list[Span], out_SB: Tensor | None) -> Tensor | None:
    """The whole block in one call, where PyTorch has a kernel for it: bf16 with rows of a multiple of 16 bytes. On a CPU
    it is the same loop in C++, which saves 10 us an expert."""
    if not (
        weight_EBA.dtype == rows_SA.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and weight_EBA.shape[1] % 8 == weight_EBA.shape[2] % 8 == 0
        and 1 in weight_EBA.stride()[1:]
        and rows_SA.device.type == "cpu"
        and weight_EBA.data_ptr() % 16 == rows_SA.data_ptr() % 16 == 0
    ):
        return None
    low, high, first = spans[0][0], spans[-1][0], spans[0][1]
    ends: list[int] = []
    at = 0
    for e, _, end in spans:
        ends += [at] * (e - low - len(ends)) + [end - first]
        at = end - first
    offsets = torch.tensor(ends, dtype=torch.int32)
    made_SB = torch.nn.functional.grouped_mm(rows_SA, weight_EBA[low : high + 1].transpose(1, 2), offs=offsets)
    return made_SB if out_SB is None else out_SB.copy_(made_SB)


def rows_by_weight(
    rows_SA: Tensor, weight_EBA: Tensor, bias_EB: Tensor | None, spans: list[Span], out_SB: Tensor | None = None
) -> Tensor:
    """rows @ weight[e].T + bias[e], as [S, B] in the dtype of the rows. The rows begin with the first span."""
    if not spans:
        return rows_SA.new_empty(0, weight_EBA.shape[1])
    dtype = rows_SA.dtype
    sizes = [end - start for _, start, end in spans]
    made_SB = _grouped(rows_SA, weight_EBA, spans, out_SB)
    if made_SB is None:
        made_SB = rows_SA.new_empty(rows_SA.shape[0], weight_EBA.shape[1]) if out_SB is None else out_SB
        for (e, _, _), rows_sA, out_sB in zip(spans, rows_SA.split(sizes), made_SB.split(sizes), strict=True):
            weight_BA = weight_EBA[e].to(dtype)
            if onednn_is_faster(rows_sA, weight_BA):
                out_sB.copy_(_onednn(rows_sA, weight_BA, None, "none", [], ""))
            else:
                torch.mm(rows_sA, weight_BA.T, out=out_sB)
    if bias_EB is not None:
        for (e, _, _), out_sB in zip(spans, made_SB.split(sizes), strict=True):
            out_sB += bias_EB[e].to(dtype)
    return made_SB


def grad_of_rows(grad_SB: Tensor, weight_EBA: Tensor, spans: list[Span], out_SA: Tensor | None = None) -> Tensor:
    """grad @ weight[e], as [S, A]."""
    return rows_by_weight(grad_SB, weight_EBA.transpose(1, 2), None, spans, out_SA)


def empty_grad(weight_EBA: Tensor, spans: list[Span]) -> Tensor:
    """Room for a bank's gradient: experts without pairs hold zeros, the others wait for `put_grad_of_weight`."""
    d_weight = prefer_huge_pages(torch.empty_like(weight_EBA))
    hit = {e for e, _, _ in spans}
    for e in range(weight_EBA.shape[0]):
        if e not in hit:
            d_weight[e].zero_()
    return d_weight


def put_grad_of_weight(d_weight_EBA: Tensor, grad_SB: Tensor, rows_SA: Tensor, spans: list[Span]) -> None:
    """d_weight[e] = grad[e].T @ rows[e], written once, straight into place where the dtypes allow."""
    first = spans[0][1] if spans else 0
    for e, start, end in spans:
        here, slot = slice(start - first, end - first), d_weight_EBA[e]
        if slot.dtype != rows_SA.dtype:
            slot.copy_(torch.mm(grad_SB[here].T, rows_SA[here]))
        elif slot.is_contiguous():
            torch.mm(grad_SB[here].T, rows_SA[here], out=slot)
        else:
            torch.mm(rows_SA[here].T, grad_SB[here], out=slot.T)  # transposed storage


def put_grad_of_bias(d_bias_EB: Tensor, grad_SB: Tensor, spans: list[Span]) -> None:
    """Row sums per expert, accumulated in fp32 or better."""
    wide = torch.promote_types(grad_SB.dtype, torch.float32)
    first = spans[0][1] if spans else 0
    for e, start, end in spans:
        d_bias_EB[e] = grad_SB[start - first : end - first].sum(0, dtype=wide)
