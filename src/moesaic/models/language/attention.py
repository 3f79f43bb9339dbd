"""Attention of the reference model: rotary positions, grouped heads, a cache, and a second run with a router's values.

Shape legend: B batch, N tokens of this call, M tokens a query may look at (cached ones and N), H query heads, J key heads,
C head width, T = B * N, V width of the mixed values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moesaic.models.language.config import MoesaicConfig


class Look:
    """Who may look at whom: `allowed` is bool [B or 1, 1, N, M], None when `is_causal` (or nothing) says it all."""

    def __init__(self, allowed: Tensor | None, is_causal: bool):
        self.allowed, self.is_causal = allowed, is_causal

    @classmethod
    def of(cls, causal: bool, mask_BM: Tensor | None, length: int, past: int, device: Any) -> Look:
        """For `length` queries after `past` cached tokens; `mask_BM` is True for real tokens among both. Every query sees
        itself, so that padding yields numbers, which nothing reads."""
        if mask_BM is None and (not causal or past == 0 or length == 1):
            return cls(None, causal and past == 0 and length > 1)
        key_M = torch.arange(past + length, device=device)
        query_N1 = past + torch.arange(length, device=device).unsqueeze(1)
        see = key_M <= query_N1 if causal else torch.ones_like(key_M <= query_N1)
        if mask_BM is not None:
            see = see & mask_BM[:, None, None, :] | (key_M == query_N1)
        return cls(see if see.dim() == 4 else see[None, None], False)


class Mixes:
    """Values that routers had mixed, kept beside keys and values in the same cache, so that it reorders and crops both.

    A forward mixes in the same order every time; the n-th mix has the n-th cache layer behind those of the attention.
    """

    def __init__(self, cache: Cache | None, first: int):
        self.cache, self.next = cache, first

    def extend(self, values_B1NV: Tensor) -> Tensor:
        """These values behind those of earlier calls, [B, 1, M, V]."""
        if self.cache is None:
            return values_B1NV
        while len(self.cache.layers) <= self.next:
            self.cache.layers.append(DynamicLayer())
        self.next += 1
        return self.cache.update(values_B1NV, values_B1NV[..., :0], self.next - 1)[0]


class MixByAttention:
    """`core.context.Attention` of one block: the attention run once more with other values."""

    def __init__(self, q_BHNC: Tensor, k_BJMC: Tensor, look: Look, mixes: Mixes | None = None):
        self.q, self.k, self.look = q_BHNC, k_BJMC, look
        self.mixes = Mixes(None, 0) if mixes is None else mixes

    def _keys(self) -> Tensor:
        return self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)

    def mix(self, values_TV: Tensor) -> Tensor:
        batch, heads, length, _ = self.q.shape
        values = self.mixes.extend(values_TV.to(self.q.dtype).view(batch, 1, length, -1)).expand(-1, heads, -1, -1)
        mixed = scaled_dot_product_attention(
            self.q, self._keys(), values, attn_mask=self.look.allowed, is_causal=self.look.is_causal
        )
        return mixed.mean(1).reshape(batch * length, -1)

    def probs(self) -> Tensor:
        scores = self.q @ self._keys().transpose(-1, -2) / self.q.shape[-1] ** 0.5
        allowed = self.look.allowed
        if self.look.is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return (scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))).softmax(-1)


class Attention(nn.Module):
    """Multi-head self-attention; `config._attn_implementation` names what runs it."""

    def __init__(self, config: MoesaicConfig, index: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, index, config.causal
        width, dim = config.head_dim, config.hidden_size
        assert width is not None and config.num_key_value_heads is not None
        self.head_dim, self.scaling = width, width**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(dim, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(dim, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(dim, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, dim, bias=False)

    def forward(
        self, x_BND: Tensor, turn: tuple[Tensor, Tensor], look: Look, cache: Cache | None, mixes: Mixes
    ) -> tuple[Tensor, MixByAttention]:
        batch, length, _ = x_BND.shape
        q, k, v = (
            project(x_BND).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y_BNHC, _ = run(self, q, k, v, look.allowed, dropout=0.0, scaling=self.scaling, is_causal=look.is_causal)
        return self.o_proj(y_BNHC.reshape(batch, length, -1)), MixByAttention(q, k, look, mixes)


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The naive twin: scores, softmax, sum; [B, N, H, C] and the probabilities."""
    probs = MixByAttention(query, key, Look(attention_mask, is_causal)).probs()
    y = probs @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return y.transpose(1, 2), probs


def turns(position_BN: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's rotation, [B, 1, N, C / 2]; the angles are float32."""
    rate = theta ** (-torch.arange(0, width, 2, device=position_BN.device, dtype=torch.float32) / width)
    angle = position_BN.float()[:, None, :, None] * rate
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_BHNC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_BHNC.chunk(2, dim=-1)
    cos, sin = cos.to(x_BHNC.dtype), sin.to(x_BHNC.dtype)  # under autocast the projections come out narrower
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
