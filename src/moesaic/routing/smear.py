"""SMEAR: one merged expert per sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router


@register("routing", "smear", paper="2306.03745", card="routing.md#smear", needs={"sequence_ids"}, causal=False)
class Smear(Router):
    """p = softmax(LN(mean of the sequence) . LN(r_e) + b_e); the experts' parameters are averaged with p.

    Everything is differentiable at the cost of one expert. Padding stays out of the mean. Both layer norms have a
    learned gain; the router vectors' starts at 0.01. `dropout` zeroes a probability in training, then the rest is
    renormalised. A sequence's mean sees its last token: not for causal hosts.
    """

    needs = frozenset({"sequence_ids"})
    bank = "adapter"

    def __init__(self, dim: int, experts: int, dropout: float = 0.0, router_init_scale: float = 0.01):
        super().__init__(experts, experts)
        self.causal = False
        self.dropout = dropout
        self.input_norm = nn.LayerNorm(dim)
        self.vector_ED = nn.Parameter(torch.randn(experts, dim))
        self.vector_gain_D = nn.Parameter(torch.full((dim,), router_init_scale))
        self.offset_E = nn.Parameter(torch.zeros(experts))

    def flops_per_token(self, length: int = 1) -> float:
        """One decision per sequence. Merging the parameters is the bank's cost."""
        return super().flops_per_token() / length

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        group_T = torch.unique(ctx.need("sequence_ids", "smear"), return_inverse=True)[1]
        with torch.autocast(x_TD.device.type, enabled=False):
            mean_GD = _masked_mean(x_TD.float(), group_T, ctx.mask)
            vectors_ED = layer_norm(self.vector_ED.float(), self.vector_gain_D.shape) * self.vector_gain_D.float()
            gain_D, shift_D = self.input_norm.weight.float(), self.input_norm.bias.float()
            input_GD = layer_norm(mean_GD, gain_D.shape, gain_D, shift_D)
            logits_GE = input_GD @ vectors_ED.T + self.offset_E.float()
        probs_GE = logits_GE.softmax(-1)
        if self.dropout and ctx.training:
            keep_GE = torch.rand(probs_GE.shape, generator=ctx.generator, device=probs_GE.device) >= self.dropout
            probs_GE = probs_GE * keep_GE + 1e-10
            probs_GE = probs_GE / probs_GE.sum(-1, keepdim=True)
        return Routing(logits_GE[group_T], probs_GE[group_T], merge_GE=probs_GE, group_T=group_T)


def _masked_mean(x_TD: Tensor, group_T: Tensor, mask_T: Tensor | None) -> Tensor:
    """Mean of each group's real tokens, [G, D]; 0 for a group that is all padding."""
    weight_T = torch.ones_like(x_TD[:, 0]) if mask_T is None else mask_T.float()
    groups = int(group_T.max()) + 1 if group_T.numel() else 0
    total_GD = x_TD.new_zeros(groups, x_TD.shape[1]).index_add(0, group_T, x_TD * weight_T.unsqueeze(1))
    count_G = x_TD.new_zeros(groups).index_add(0, group_T, weight_T)
    return total_GD / count_G.clamp(min=1).unsqueeze(1)
