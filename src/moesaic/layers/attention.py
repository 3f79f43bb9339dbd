"""Plain multi-head self-attention over sequences, for layers that bring their own."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moesaic.core.errors import BadInput


def head_width(dim: int, heads: int) -> int:
    if heads < 1 or dim % heads:
        raise BadInput(f"heads={heads} does not divide dim={dim}")
    return dim // heads


class SelfAttention(nn.Module):
    """y [B, N, D] = O softmax(Q K^T / sqrt C) V under `allowed` (bool [B, N, N]); no positions are encoded."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.width = heads, head_width(dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BND: Tensor, allowed_BNN: Tensor) -> Tensor:
        batch, length, _ = x_BND.shape
        q, k, v = self.qkv(x_BND).view(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v, attn_mask=allowed_BNN.unsqueeze(1))
        return self.out(y.transpose(1, 2).flatten(2))
