"""Union of Experts' block: attention heads as experts, then the slices of an MLP as experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.attention import head_width, join, rotate, split
from moesaic.layers.layer import Layer, summed_losses
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.routing.union_of_experts import UnionOfExperts


class SelectiveAttention(nn.Module):
    """SMHA: a token takes part in k of H heads, as query, key and value; each head sees its own tokens only.

    Positions and the causal mask are those of the selected subset. Heads gather their tokens, so attention costs L * L
    of the longest subset instead of N * N. With every head chosen at weight 1 it is multi-head attention.
    """

    def __init__(self, dim: int, heads: int, k: int):
        super().__init__()
        if head_width(dim, heads) % 2:
            raise BadInput(f"dim={dim}, heads={heads}: rotary positions need an even head width")
        self.heads = heads
        self.router = UnionOfExperts(dim, heads, k)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x_TD: Tensor, at: Sequences, ctx: RoutingContext, causal: bool) -> tuple[Tensor, Routing]:
        routing = self.router(x_TD, ctx)
        assert routing.experts_TK is not None and routing.weights_TK is not None
        chosen_TK = routing.experts_TK >= 0
        weight_TH = torch.zeros_like(routing.logits_TE).scatter_add(1, routing.experts_TK.clamp(min=0), routing.weights_TK)
        taken_TH = torch.zeros_like(weight_TH).scatter_add(1, routing.experts_TK.clamp(min=0), chosen_TK.float())
        weight_BHN, taken_BHN = at.pad(weight_TH).mT, at.pad(taken_TH).mT > 0
        order_BHN = torch.sort(~taken_BHN, dim=-1, stable=True).indices
        most = int(taken_BHN.sum(-1).max()) if taken_BHN.numel() else 0
        order_BHL = order_BHN[..., :most]
        x_BND, index = at.pad(x_TD), order_BHL.unsqueeze(-1).expand(-1, -1, -1, x_TD.shape[1] // self.heads)
        q, k, v = (split(part(x_BND), self.heads).gather(2, index) for part in (self.query, self.key, self.value))
        real_BHL = taken_BHN.gather(2, order_BHL)
        look = real_BHL.unsqueeze(2).expand(-1, -1, most, -1)
        if causal:
            look = look & torch.ones(most, most, dtype=torch.bool, device=x_TD.device).tril()
        look = look | torch.eye(most, dtype=torch.bool, device=x_TD.device)
        found = scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=look)
        found = found * (weight_BHN.gather(2, order_BHL) * real_BHL).unsqueeze(-1).to(found.dtype)
        spread = found.new_zeros(*taken_BHN.shape, found.shape[-1]).scatter(2, index, found)
        return at.flat(self.out(join(spread))), routing


@register("layers", "union_of_experts", paper="2503.02495", card="routing.md#uoe", needs={"sequence_ids", "positions"})
class UoE(Layer):
    """h + SMHA(LN h), then + UoME(LN of that): k_heads of `heads` heads (half by default), k of `experts` MLP slices.

    `width` is a slice's. `keep` truncates the slices' tokens (see the router): not for causal hosts. The routing is
    the MLP's; `passes` holds the heads' and the slices'.
    """

    needs = frozenset({"sequence_ids", "positions"})
    attends: ClassVar[bool] = True
    own_norm: ClassVar[bool] = True
    no_cache: ClassVar[str] = "which earlier tokens a head holds is decided in the layer's own pass over a sequence"

    def __init__(
        self,
        dim: int,
        experts: int = 4,
        k: int = 2,
        width: int | None = None,
        heads: int = 4,
        k_heads: int | None = None,
        keep: float | None = None,
        balance: Mapping[str, float] | None = None,
        causal: bool = True,
        *,
        host: Iterable[str] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.check_host(type(self), self.needs, host)
        self.causal = causal
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelectiveAttention(dim, heads, max(1, heads // 2) if k_heads is None else k_heads)
        router = UnionOfExperts(dim, experts, k, keep=keep)
        bank = {**({} if width is None else {"width": width}), **(bank_options or {})}
        self.ffn = MoE(dim, experts, router, balance=balance or {}, causal=causal, bank_options=bank)

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD, at = x.reshape(-1, x.shape[-1]), Sequences(x, ctx)
        found_TD, heads = self.attention(self.attention_norm(x_TD), at, ctx, self.causal)
        y_TD, slices = self.ffn(self.ffn_norm(x_TD + found_TD), ctx)
        passes = (heads, slices)
        return (found_TD + y_TD).reshape(x.shape), slices.replace(aux=summed_losses(passes), passes=passes)

    def after_step(self) -> None:
        self.ffn.after_step()
