"""A gate with a nonlinearity before the softmax, whose temperature can be told from its slope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.follow import Follow
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise
from moesaic.schedules.schedule import Scheduled

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": gelu,
    "identity": lambda l: l,
}


@register("routing", "activation_gate", paper="2401.13875", card="routing.md#dts-theory")
class ActivationGate(Router):
    """p = softmax((sigma(x W^T) + b0) / tau), top-k, renormalised (or raw with `renormalise=False`).

    tau is learned (its logarithm is the parameter) from the given number, or follows it as a schedule with
    `learned=False`: a scheduled temperature is nobody's estimate. sigma: "sigmoid", "tanh" and "gelu" make tau
    identifiable; "identity" is the linear gate for comparison, which (W, b0, tau) -> c (W, b0, tau) leaves unchanged. A
    bounded sigma can be no sharper than 2 / tau (tanh).
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        activation: Literal["sigmoid", "tanh", "gelu", "identity"] = "sigmoid",
        tau: Scheduled = 1.0,
        learned: bool = True,
        renormalise: bool = True,
    ):
        super().__init__(experts, k)
        if activation not in ACTIVATIONS:
            raise BadInput(f"activation={activation!r}: one of {', '.join(ACTIVATIONS)}")
        self.activation, self.renormalise = activation, renormalise
        follow = Follow(tau, "tau")
        follow.check(1e-6, float("inf"))
        if learned and follow.schedule.moves:
            raise BadInput("tau: a schedule cannot also be learned: give a number, or learned=False")
        self.log_tau = nn.Parameter(torch.tensor(follow.schedule.low).log()) if learned else None
        self.follow_tau = None if learned else follow
        self.needs = frozenset() if learned else follow.needs
        self.linear = LinearScore(dim, experts)
        self.offset_E = nn.Parameter(torch.zeros(experts))

    def score(self, x_TD: Tensor, ctx: RoutingContext) -> Tensor:
        inner_TE = ACTIVATIONS[self.activation](self.linear(x_TD, ctx)) + self.offset_E.float()
        if self.log_tau is not None:
            return inner_TE / self.log_tau.float().exp()
        assert self.follow_tau is not None
        return inner_TE / self.follow_tau(ctx)

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        return top_k(logits_TE, self.k)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        weights_TK = gather(logits_TE.softmax(-1), experts_TK)
        return renormalise(weights_TK) if self.renormalise else weights_TK
