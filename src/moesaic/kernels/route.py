"""The softmax top-k router of a decoding step on a CPU: one pass in place of six operations on a few numbers each.

Its twin is a router module's own forward: linear, softmax in fp32, top-k, and the division by their sum where `normalise`.

Shape legend: D model width, E experts, K slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.few_rows import MULTIPLE, available


def suits(weight_ED: Tensor, k: int) -> bool:
    """Whether the pass can read this router."""
    return (
        weight_ED.dtype is torch.bfloat16
        and weight_ED.device.type == "cpu"
        and weight_ED.dim() == 2
        and weight_ED.is_contiguous()
        and weight_ED.shape[1] % MULTIPLE == 0
        and 0 < k <= weight_ED.shape[0]
        and available()
    )


def softmax_topk(x_1D: Tensor, weight_ED: Tensor, k: int, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits bf16 [1, E], weights fp32 [1, K] in falling order, ids int64 [1, K] of one token of bf16, for what `suits`.

    Of equal logits the lowest id comes first.
    """
    from moesaic.kernels.compiled import pool
    from moesaic.kernels.compiled.route import softmax_topk as route

    experts, width = weight_ED.shape
    x_1D = x_1D.contiguous()
    logits_1E, weights_1K = x_1D.new_empty(1, experts), torch.empty(1, k)
    ids_1K = torch.empty(1, k, dtype=torch.int64)
    route(
        x_1D.data_ptr(), weight_ED.data_ptr(), width, experts, k, normalise,
        logits_1E.data_ptr(), weights_1K.data_ptr(), ids_1K.data_ptr(), pool.join(),
    )  # fmt: skip
    return logits_1E, weights_1K, ids_1K
