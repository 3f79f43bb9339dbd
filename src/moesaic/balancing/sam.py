"""SAM's load losses: over groups, and inside each group over the tokens that reached it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Scope, masked_mean, probabilities, share_of
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "sam", paper="2110.07431", card="routing.md#sam")
class SamLoad(Balancer):
    """G sum_g f_g Q_g + mean over reached groups of (E / G) sum_e f_e R_e + align * CE(group mass of softmax(l), q).

    Q_g is a token's probability of group g, R_e = p_e / Q_g inside it; f are detached shares of choices. Each level is 1 at
    balance. `align` draws the switch to the groups that hold the best experts of all (the card's optional term; off).
    """

    def __init__(self, coefficient: float = 0.01, groups: int = 1, align: float = 0.0):
        self.coefficient, self.groups, self.align = coefficient, groups, align

    def bind(self, router: nn.Module) -> SamLoad:
        self.groups = getattr(router, "groups", self.groups)
        return self

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts, groups = routing.num_experts, self.groups
        if experts % groups:
            raise BadInput(f"groups={groups} does not divide {experts} experts")
        assert routing.experts_TK is not None
        count_TE = torch.zeros_like(routing.logits_TE, dtype=torch.float32)
        count_TE.scatter_add_(1, routing.experts_TK.clamp(min=0), (routing.experts_TK >= 0).float())
        if scope.mask_T is not None:
            count_TE = count_TE * scope.mask_T.unsqueeze(1)
        count_TGe = count_TE.unflatten(1, (groups, -1))
        p_TGe = probabilities(routing).unflatten(1, (groups, -1))
        q_TG = p_TGe.sum(-1)
        reached_TG = (count_TGe.sum(-1) > 0).float()
        reached_G = scope.tally("sam_groups", reached_TG.sum(0))
        f_G = share_of(reached_G)
        total = groups * (f_G * masked_mean(q_TG, scope.mask_T)).sum()
        r_TGe = p_TGe / q_TG.clamp(min=1e-20).unsqueeze(-1)
        r_Ge = (r_TGe * reached_TG.unsqueeze(-1)).sum(0) / reached_TG.sum(0).clamp(min=1).unsqueeze(-1)
        f_Ge = share_of(scope.tally("sam_experts", count_TGe.sum(0)))
        total = total + experts / groups * (f_Ge * r_Ge).sum() / (reached_G > 0).sum().clamp(min=1)
        if self.align:
            best_TG = routing.logits_TE.float().softmax(-1).unflatten(1, (groups, -1)).sum(-1).detach()
            total = total - self.align * masked_mean((best_TG * q_TG.clamp(min=1e-20).log()).sum(-1), scope.mask_T)
        return total
