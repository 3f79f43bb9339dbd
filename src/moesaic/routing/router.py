"""A router is score + select + weigh, three replaceable callables, and can run outside any layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.routing.score import LinearScore

Score = Callable[[Tensor, RoutingContext], Tensor]
Select = Callable[[Tensor, RoutingContext], Tensor]
Weigh = Callable[[Tensor, Tensor, RoutingContext], Tensor]


class Router(nn.Module):
    """Base of every router: `router(x_TD, ctx) -> Routing`.

    A subclass either sets `score`, `select` and `weigh` and inherits `forward`, or overrides `forward`.
    `needs` names fields of RoutingContext that the host must give; `causal` says that a token's routing sees
    no later token. `shared(...)` builds modules that one model shares between all its MoE layers.
    """

    needs: frozenset[str] = frozenset()
    causal: bool = True
    no_cache: str = ""
    """Why a host cannot decode with this router one token at a time against its cache; empty when it can."""
    keyed: ClassVar[bool] = False
    """It returns the keyed form: gates over the halves of a bank."""
    bank: ClassVar[str] = "gated_mlp"
    """The registered bank that this router is made for."""

    def __init__(self, experts: int, k: int):
        super().__init__()
        if experts < 1 or k < 0:
            raise BadInput(f"experts={experts}, k={k}: a router needs at least one expert and k >= 0")
        if k > experts:
            raise BadInput(f"k={k} experts per token, but the router has only {experts} rows: lower k or add experts")
        self.num_experts, self.k = experts, k
        self.score: Score
        self.select: Select
        self.weigh: Weigh

    @staticmethod
    def shared(dim: int, **options: Any) -> dict[str, nn.Module]:
        """Modules that all layers of one model share, passed to each layer's constructor by name."""
        return {}

    @property
    def parameter_count(self) -> int:
        """Parameters of the router, shared modules included; what it adds to a layer beside the bank."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int = 1) -> float:
        """FLOPs to route one of the `length` tokens of a sequence, in training: matrix products and `sweep_flops`.

        By default every matrix of the router multiplies once, 2 FLOPs per entry: 2 D E for a linear one.
        """
        return 2.0 * sum(p.numel() for p in self.parameters() if p.dim() > 1) + self.sweep_flops

    @property
    def fixed_flops(self) -> float:
        """FLOPs per forward whatever its tokens, beside flops_per_token: a table of tasks that all of them share."""
        return 0.0

    @property
    def sweep_flops(self) -> float:
        """FLOPs per token of an iterative solver's elementwise sweeps; a part of flops_per_token. 0 without a solver."""
        return 0.0

    @torch.no_grad()
    def extend(self, weight_ED: Tensor) -> bool:
        """Retrofit: start from a trained linear router's rows [E, D]; rows beyond E start at their mean, so that no slot
        goes to them at once. False for a router that scores by other means: it starts as it was built."""
        linear = getattr(getattr(self, "score", None), "score", getattr(self, "score", None))
        weight = getattr(linear, "weight", None)
        if type(linear) is not LinearScore or not isinstance(weight, Tensor) or weight.shape[1] != weight_ED.shape[1]:
            return False
        extra = len(weight) - len(weight_ED)
        if extra < 0:
            return False
        weight.copy_(torch.cat([weight_ED.float(), weight_ED.float().mean(0, keepdim=True).expand(extra, -1)]))
        return True

    def as_top_k(self) -> tuple[Tensor, bool] | None:
        """Rows [E, D], and whether weights are divided by their sum, where evaluation is a plain softmax top-k of this `k`;
        else None. Such a router leaves a checkpoint that stock transformers loads."""
        return None

    def probs(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        """What load losses call probability; softmax unless a router says otherwise."""
        return logits_TE.softmax(-1)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx)
        experts_TK = self.select(logits_TE, ctx)
        weights_TK = self.weigh(logits_TE, experts_TK, ctx)
        return empty_padding(Routing(logits_TE, self.probs(logits_TE, ctx), experts_TK, weights_TK), ctx)


def empty_padding(routing: Routing, ctx: RoutingContext) -> Routing:
    """Padding tokens get empty slots: they use no expert, no capacity and no share of the load."""
    if ctx.mask is None or routing.experts_TK is None:
        return routing
    real_T1 = ctx.mask.unsqueeze(1)
    changes: dict[str, Tensor] = {"experts_TK": routing.experts_TK.masked_fill(~real_T1, -1)}
    if routing.weights_TK is not None:
        changes["weights_TK"] = routing.weights_TK.masked_fill(~real_T1, 0.0)
    if routing.selected_TK is not None:
        changes["selected_TK"] = routing.selected_TK.masked_fill(~real_T1, -1)
    return routing.replace(**changes)
