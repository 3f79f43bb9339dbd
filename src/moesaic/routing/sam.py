"""SAM: switch to one group of experts, mix several inside it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import default_groups, top_k
from moesaic.routing.weigh import renormalise


@register("routing", "sam", paper="2110.07431", card="routing.md#sam")
class Sam(Router):
    """q = softmax over G groups, g* = argmax; r = softmax over the experts of g*; w = scale * q_g* * r of its k best.

    A token's experts lie in one group (device), so it is sent once whatever k is. `switch="hash"` takes the group from
    the token id (needs token_ids), with q = 1. `renormalise` divides r by its sum over the chosen; `scale` undoes the
    shrinking by two softmaxes. `probs_TE` is the joint q_g r_e, which sums to 1 over all experts; the losses of both
    levels read it (balancing/sam.py). Default k: the whole group, at most 4; default groups: 8, 4, 2 or 1.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        groups: int | None = None,
        k: int | None = None,
        switch: Literal["router", "hash"] = "router",
        renormalise: bool = False,
        scale: float = 1.0,
    ):
        groups = default_groups(experts) if groups is None else groups
        if groups < 1 or experts % groups:
            raise BadInput(f"groups={groups} does not divide experts={experts}")
        size = experts // groups
        k = min(4, size) if k is None else k
        if not 1 <= k <= size:
            raise BadInput(f"k={k}: a group has {size} of the {experts} experts")
        if switch not in ("router", "hash"):
            raise BadInput(f"switch={switch!r}: router or hash")
        super().__init__(experts, k)
        self.groups, self.switch, self.renormalise, self.scale = groups, switch, renormalise, scale
        self.needs = frozenset({"token_ids"} if switch == "hash" else ())
        self.score = LinearScore(dim, experts)
        self.group_score = LinearScore(dim, groups) if switch == "router" else None

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        inside_TGe = logits_TE.unflatten(1, (self.groups, -1)).softmax(-1)
        size = inside_TGe.shape[2]
        if self.group_score is None:
            group_T = ctx.need("token_ids", "sam with switch='hash'") % self.groups
            switch_TG = torch.nn.functional.one_hot(group_T, self.groups).float()
        else:
            switch_TG = self.group_score(x_TD, ctx).softmax(-1)
            group_T = top_k(switch_TG, 1).squeeze(1)
        chosen_Te = inside_TGe.gather(1, group_T.view(-1, 1, 1).expand(-1, 1, size)).squeeze(1)
        best_TK = top_k(chosen_Te, self.k)
        weights_TK = chosen_Te.gather(1, best_TK)
        if self.renormalise:
            weights_TK = renormalise(weights_TK)
        weights_TK = self.scale * switch_TG.gather(1, group_T.unsqueeze(1)) * weights_TK
        probs_TE = (switch_TG.unsqueeze(-1) * inside_TGe).flatten(1)
        experts_TK = best_TK + size * group_T.unsqueeze(1)
        return empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK), ctx)
