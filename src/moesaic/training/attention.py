"""Causal attention for training short sequences on a CPU: plain matrix products over the lower triangle.

torch's fused CPU attention recomputes the scores in its backward pass to save memory that a short sequence does not
need saved, and takes two fifths of a small model's step. Here the probabilities are kept in the working dtype, queries go
in blocks that look no further than their own end, and grouped heads share one product per key head. `reference` is the
naive twin.

Shape legend: B batch, H query heads, J key heads, G = H / J, N sequence, C head width, R rows of one query block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "moesaic_short"
BLOCK = 128
LONGEST = 1024
"""Beyond this the kept probabilities (N * N / 2 per head) cost more than the recomputation."""


def reference(q_BHNC: Tensor, k_BJNC: Tensor, v_BJNC: Tensor, scale: float) -> Tensor:
    """Attention of every token to itself and what came before, in float32."""
    groups = q_BHNC.shape[1] // k_BJNC.shape[1]
    k, v = (x.float().repeat_interleave(groups, 1) for x in (k_BJNC, v_BJNC))
    scores = q_BHNC.float() @ k.transpose(-1, -2) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).to(q_BHNC.dtype)


def short_attention(q_BHNC: Tensor, k_BJNC: Tensor, v_BJNC: Tensor, scale: float) -> Tensor:
    """`reference` in the dtype of its input (or of autocast), [B, N, H, C]: the layout the output projection reads."""
    device = q_BHNC.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q_BHNC, k_BJNC, v_BJNC = q_BHNC.to(dtype), k_BJNC.to(dtype), v_BJNC.to(dtype)
    return _ShortAttention.apply(q_BHNC, k_BJNC, v_BJNC, scale)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHNC: Tensor, k_BJNC: Tensor, v_BJNC: Tensor, scale: float) -> Tensor:
        B, H, N, C = q_BHNC.shape
        J = k_BJNC.shape[1]
        q = (q_BHNC * scale).reshape(B * J, H // J, N, C)
        k, v = k_BJNC.reshape(B * J, N, C), v_BJNC.reshape(B * J, N, C)
        out = q.new_empty(B, N, J, H // J, C)
        hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        kept = []
        for start, end in _blocks(N):
            scores = torch.bmm(_rows(q, start, end), k[:, :end].transpose(1, 2))
            own = scores.view(B * J, H // J, end - start, end)[..., start:]
            own += hidden[: end - start, : end - start]
            probs = scores.softmax(-1)
            mixed = torch.bmm(probs, v[:, :end]).view(B, J, H // J, end - start, C)
            out[:, start:end] = mixed.permute(0, 3, 1, 2, 4)
            kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out.view(B, N, H, C)

    @staticmethod
    def backward(ctx: Any, grad_BNHC: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        BJ, G, N, C = q.shape
        B, J = grad_BNHC.shape[0], BJ // grad_BNHC.shape[0]
        grad = grad_BNHC.reshape(B, N, J, G, C).permute(0, 2, 3, 1, 4).reshape(BJ, G, N, C)
        dq = torch.empty_like(q)
        # Sums over query blocks: float32, or late blocks would round the early ones away.
        dk, dv = (torch.zeros(BJ, N, C, dtype=torch.float32, device=q.device) for _ in range(2))
        for (start, end), probs in zip(_blocks(N), kept, strict=True):
            grad_rows = _rows(grad, start, end)
            dprobs = torch.bmm(grad_rows, v[:, :end].transpose(1, 2))
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dv[:, :end] += torch.bmm(probs.transpose(1, 2), grad_rows)
            dk[:, :end] += torch.bmm(dscores.transpose(1, 2), _rows(q, start, end))
            dq[:, :, start:end] = torch.bmm(dscores, k[:, :end]).view(BJ, G, end - start, C)
        dq *= ctx.scale
        return dq.view(B, J * G, N, C), dk.to(k.dtype).view(B, J, N, C), dv.to(v.dtype).view(B, J, N, C), None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + BLOCK)) for start in range(0, length, BLOCK)]


def _rows(x: Tensor, start: int, end: int) -> Tensor:
    """Rows of one block for every head of a group, [BJ, G * R, C]."""
    return x[:, :, start:end].reshape(x.shape[0], -1, x.shape[-1])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; anything but plain causal attention over the whole sequence goes to its own `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    shape = query.shape[2] == key.shape[2] <= LONGEST and key.shape == value.shape
    special = any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    if causal and shape and attention_mask is None and not dropout and not special:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return short_attention(query, key, value, scale), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def install() -> str:
    """Register with transformers; returns the name to give as `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
