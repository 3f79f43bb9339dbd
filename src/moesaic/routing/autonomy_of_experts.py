"""Autonomy-of-Experts: no router; the experts with the largest own activations run."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "autonomy_of_experts", paper="2501.13074", card="routing.md#aoe", needs={"activations"})
class AutonomyOfExperts(Router):
    """n_te = ||x Wdown_e||, p = softmax over all experts of n, top-k of p, weights p (not renormalised by default).

    The activations come from the bank (`autonomous`) through the context, are computed once, and the winners' rows
    are reused when the bank runs. Not reparametrisation invariant: scaling (c Wdown_e, Wup_e / c) moves e's rank.
    """

    needs = frozenset({"activations"})
    bank = "autonomous"

    def __init__(self, dim: int, experts: int, k: int = 2, renormalise: bool = False, eps: float = 1e-12):
        super().__init__(experts, k)
        self.renormalise, self.eps = renormalise, eps

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        a_TER = ctx.need("activations", "autonomy_of_experts")(x_TD).float()
        norms_TE = (a_TER.square().sum(-1) + self.eps).sqrt()
        probs_TE = norms_TE.softmax(-1)
        experts_TK = top_k(norms_TE, self.k)
        weights_TK = gather(probs_TE, experts_TK)
        if self.renormalise:
            weights_TK = renormalise(weights_TK)
        return empty_padding(Routing(norms_TE, probs_TE, experts_TK, weights_TK), ctx)
