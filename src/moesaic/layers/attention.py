"""Self-attention over sequences, for layers that bring their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moesaic.core.errors import BadInput


def head_width(dim: int, heads: int) -> int:
    """Width of a head. Raises BadInput when the heads do not divide the model."""
    if heads < 1 or dim % heads:
        raise BadInput(f"heads={heads} does not divide dim={dim}")
    return dim // heads


def split(x_BND: Tensor, heads: int) -> Tensor:
    """[B, N, D] -> [B, heads, N, C]."""
    return x_BND.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(y_BHNC: Tensor) -> Tensor:
    """[B, heads, N, C] -> [B, N, D]."""
    return y_BHNC.transpose(1, 2).flatten(2)


def rotate(x_BHNC: Tensor, position: Tensor | None = None) -> Tensor:
    """Rotary positions; `position` broadcasts to [B, heads, N] and defaults to 0 .. N - 1. Width must be even."""
    length, width = x_BHNC.shape[-2:]
    at = torch.arange(length, device=x_BHNC.device) if position is None else position
    rate = 10000.0 ** (-torch.arange(0, width, 2, device=x_BHNC.device) / width)
    angle = at.unsqueeze(-1) * rate
    cos, sin = angle.cos().to(x_BHNC.dtype), angle.sin().to(x_BHNC.dtype)
    a, b = x_BHNC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SelfAttention(nn.Module):
    """y [B, N, D] = O softmax(Q K^T / sqrt C) V under `allowed` (bool [B, N, N])."""

    def __init__(self, dim: int, heads: int, rotary: bool = False):
        super().__init__()
        self.heads, width = heads, head_width(dim, heads)
        if rotary and width % 2:
            raise BadInput(f"dim={dim}, heads={heads}: rotary positions need an even head width, not {width}")
        self.rotary = rotary
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x_BND: Tensor, allowed_BNN: Tensor) -> Tensor:
        return self.attend(x_BND, self.key(x_BND), self.value(x_BND), allowed_BNN)

    def attend(self, x_BND: Tensor, key_BND: Tensor, value_BND: Tensor, allowed_BNN: Tensor) -> Tensor:
        """Attention of x's queries over given keys and values."""
        q, k, v = (split(part, self.heads) for part in (self.query(x_BND), key_BND, value_BND))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        return self.out(join(scaled_dot_product_attention(q, k, v, attn_mask=allowed_BNN.unsqueeze(1))))
