"""Attention of a decoding step on a CPU: one query per sequence against bf16 keys and values, in one compiled pass.

PyTorch's own takes 0.3 ms for a step of 16 heads over 256 positions, a hundred times what the reading takes, and it takes
it in every layer. Registered with transformers as the attention implementation "moesaic"; whatever is no such step (more
queries, a mask, dropout, gradients, another dtype) goes to "sdpa", which is also its twin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.few_rows import MULTIPLE, available, bits

NAME = "moesaic"


def attend(query_BHW: Tensor, key_BGSW: Tensor, value_BGSW: Tensor, scale: float) -> Tensor:
    """[B, H, W] of a query per sequence; H is a multiple of G, W of 32. bf16 on the CPU, no gradients."""
    from moesaic.kernels.compiled import attention, pool

    pool.join()
    heads = query_BHW.shape[:2]
    y_BHW = torch.empty(query_BHW.shape, dtype=torch.bfloat16)
    attention.attend(
        bits(query_BHW.contiguous()),
        bits(key_BGSW.contiguous()),
        bits(value_BGSW.contiguous()),
        scale,
        torch.empty(*heads, key_BGSW.shape[2]).numpy(),
        torch.empty(query_BHW.shape).numpy(),
        bits(y_BHW),
    )
    return y_BHW


def forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, dropout: float = 0.0,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention call: query [B, H, T, W], key and value [B, G, S, W] -> [B, T, H, W]."""
    one_step = (
        query.shape[2] == 1
        and attention_mask is None
        and not dropout
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % MULTIPLE == 0
        and all(value is None for name, value in kwargs.items() if name in OTHERWISE)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )
    if not one_step:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )  # fmt: skip
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return attend(query.squeeze(2), key, value, scale).unsqueeze(1), None


OTHERWISE = ("softcap", "position_bias", "cache", "s_aux")
"""Arguments that change what attention computes."""


def register() -> None:
    """Make the name known to transformers: the function, and sdpa's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
