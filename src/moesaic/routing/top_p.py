"""Top-p routing: as many experts as it takes to pass a probability mass."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_p
from moesaic.routing.weigh import gather, renormalise


@register("routing", "top_p", paper="2403.07652", card="routing.md#dynamic_moe")
class TopP(Router):
    """The smallest expert set whose probability mass exceeds p (Dynamic_MoE; HMoE's top-p with renormalise=True).

    n_t = 1 + #{j : cumulative_j <= p}; weights are raw probabilities unless `renormalise`. The selection is [T, E]
    with empty slots behind the set.
    """

    def __init__(self, dim: int, experts: int, p: float = 0.4, renormalise: bool = False):
        super().__init__(experts, experts)
        if not 0 <= p <= 1:
            raise BadInput(f"p={p} must be between 0 and 1")
        self.p, self.renormalise = p, renormalise
        self.score = LinearScore(dim, experts)

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        return top_p(logits_TE.softmax(-1), self.p)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        weights_TK = gather(logits_TE.softmax(-1), experts_TK)
        return renormalise(weights_TK) if self.renormalise else weights_TK
