"""DeepSeek's sequence-level balance loss."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, probabilities
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "sequence", paper="2412.19437", card="layers-and-balancing.md#alf-lb")
class Sequence(Balancer):
    """Mean over sequences of sum_e f_e P_e, f_e = E / (K T_s) * count in the sequence, P over normalised scores.

    1 at uniform routing (times the coefficient: V3's alpha).
    """

    def __init__(self, coefficient: float = 1e-4):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        if scope.sequence_ids is None:
            raise BadInput("the sequence loss needs sequence_ids: which sequence each token belongs to")
        chosen_TK = routing.experts_TK if routing.selected_TK is None else routing.selected_TK
        assert chosen_TK is not None
        experts = routing.num_experts
        group_T = torch.unique(scope.sequence_ids, return_inverse=True)[1]
        mask_T = torch.ones_like(group_T, dtype=torch.bool) if scope.mask_T is None else scope.mask_T
        groups = int(group_T.max()) + 1
        hits_TE = torch.zeros_like(routing.logits_TE, dtype=torch.float32)
        hits_TE.scatter_add_(1, chosen_TK.clamp(min=0), ((chosen_TK >= 0) & mask_T.unsqueeze(1)).float())
        count_GE = hits_TE.new_zeros(groups, experts).index_add(0, group_T, hits_TE)
        tokens_G1 = hits_TE.new_zeros(groups).index_add(0, group_T, mask_T.float()).clamp(min=1).unsqueeze(1)
        p_TE = probabilities(routing) * mask_T.unsqueeze(1)
        p_GE = p_TE.new_zeros(groups, experts).index_add(0, group_T, p_TE) / tokens_G1
        f_GE = experts * count_GE / count_GE.sum(1, keepdim=True).clamp(min=1)
        return (f_GE * p_GE).sum(1).mean()
