"""GShard: top-2 whose second expert runs only when it matters, or by chance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.topk import TopK


@register("routing", "gshard", paper="2006.16668", card="layers-and-balancing.md#lbl")
class GShard(TopK):
    """Renormalised top-2; in training the second expert is kept by `second`.

    "random": with probability min(1, w2 / threshold); "threshold": when w2 exceeds it; "all"; "none". The first
    expert's weight stays as renormalised over both. Evaluation keeps both.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        second: Literal["random", "threshold", "all", "none"] = "random",
        threshold: float = 0.2,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
    ):
        if second not in ("random", "threshold", "all", "none"):
            raise BadInput(f"second={second!r}: one of random, threshold, all, none")
        super().__init__(dim, experts, 2, capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        self.second, self.threshold = second, threshold

    def limit(self, routing: Routing, ctx: RoutingContext) -> Routing:
        """Second choices that lose are dropped before they can take capacity."""
        assert routing.experts_TK is not None
        assert routing.weights_TK is not None
        if not ctx.training or self.second == "all":
            return super().limit(routing, ctx)
        lost_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        lost_TK[:, 1] = ~self._keep(routing.weights_TK[:, 1].detach(), ctx) & (routing.experts_TK[:, 1] >= 0)
        return super().limit(routing.drop(lost_TK), ctx)

    def _keep(self, weight_T: Tensor, ctx: RoutingContext) -> Tensor:
        if self.second == "none":
            return torch.zeros_like(weight_T, dtype=torch.bool)
        if self.second == "threshold":
            return weight_T > self.threshold
        chance_T = torch.rand(weight_T.shape, generator=ctx.generator, device=weight_T.device)
        return chance_T < weight_T / self.threshold
