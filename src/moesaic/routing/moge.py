"""MoGE (Pangu Pro MoE): the best experts of every group, so that devices carry equal loads by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore
from moesaic.routing.select import default_groups, top_k
from moesaic.routing.weigh import gather


@register("routing", "moge", paper="2505.21411", card="routing.md#moge")
class MoGE(Router):
    """s = softmax over all experts; the best `per_group` of each of `groups` groups of consecutive ids; w = s[idx] * scale.

    K = groups * per_group. `scale_E` is a learned factor per expert that starts at 1; weights are not renormalised. Inside a
    group the load may still be uneven: the paper balances it by the load loss over these selections (`switch`). Not the
    same as topk's `keep_groups`, which picks few groups. `voted`, an option of evaluation: each token votes for the best
    expert of each group, and only the `voted` most voted experts of a group can be chosen; it reads fewer experts, but a
    token's output then depends on the other tokens of the call. Default groups: 8, 4, 2 or 1, what divides the experts.
    """

    def __init__(self, dim: int, experts: int, groups: int | None = None, per_group: int = 1, voted: int | None = None):
        groups = default_groups(experts) if groups is None else groups
        if groups < 1 or experts % groups:
            raise BadInput(f"groups={groups} does not divide experts={experts}")
        size = experts // groups
        if not 1 <= per_group <= size:
            raise BadInput(f"per_group={per_group}: each of the {groups} groups has {size} experts")
        if voted is not None and not per_group <= voted <= size:
            raise BadInput(f"voted={voted}: must be between per_group={per_group} and the {size} experts of a group")
        super().__init__(experts, groups * per_group)
        self.groups, self.per_group, self.voted = groups, per_group, voted
        self.causal = voted is None
        self.score = LinearScore(dim, experts)
        self.scale_E = nn.Parameter(torch.ones(experts))

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        grouped = logits_TE.detach().unflatten(1, (self.groups, -1))
        if self.voted is not None and not ctx.training:
            grouped = grouped.masked_fill(~self._elected(grouped, ctx.mask), float("-inf"))
        tokens, groups, size = grouped.shape
        best = top_k(grouped.reshape(-1, size), self.per_group).view(tokens, groups, self.per_group)
        return (best + size * torch.arange(groups, device=best.device).view(1, -1, 1)).flatten(1)

    def _elected(self, grouped_TGe: Tensor, mask_T: Tensor | None) -> Tensor:
        """True for the most voted experts of each group, [G, E / G]; padding has no vote."""
        assert self.voted is not None
        best_TG = top_k(grouped_TGe.flatten(0, 1), 1).view(grouped_TGe.shape[:2])
        votes_GT = torch.ones_like(best_TG.T) if mask_T is None else mask_T.to(best_TG.dtype).expand(self.groups, -1)
        votes_Ge = best_TG.new_zeros(grouped_TGe.shape[1:]).scatter_add_(1, best_TG.T, votes_GT)
        return torch.zeros_like(votes_Ge, dtype=torch.bool).scatter_(1, top_k(votes_Ge, self.voted), True)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        return gather(logits_TE.softmax(-1) * self.scale_E.float(), experts_TK)
