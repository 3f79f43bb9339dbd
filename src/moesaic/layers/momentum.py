"""MomentumSMoE: heavy-ball, Adam and robust momentum of the expert output, across depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.experts.bank import ExpertBank
from moesaic.layers.moe import MoE
from moesaic.routing.router import Router

Rule = Literal["heavy_ball", "adam", "robust"]


def robust_constants(k: float, smoothness: float, rho: float) -> tuple[float, float, float]:
    """gamma, mu, a of the robust momentum method for condition number k and rho in [1 - 1/sqrt k, 1 - 1/k]."""
    if k <= 1 or smoothness <= 0 or not 1 - k**-0.5 - 1e-12 <= rho <= 1 - 1 / k + 1e-12:
        raise BadInput(f"rho={rho}, condition={k}, smoothness={smoothness}: need k > 1 and 1 - 1/sqrt(k) <= rho <= 1 - 1/k")
    gamma = k * (1 - rho) ** 2 * (1 + rho) / smoothness
    return gamma, k * rho**3 / (k - 1), rho**3 / ((k - 1) * (1 - rho) ** 2 * (1 + rho))


@register("layers", "momentum", paper="2410.14574", card="layers-and-balancing.md#momentumsmoe", needs={"carry"})
class Momentum(MoE):
    """The stream gets x + y with y made from the layer's output o and the momentum m that every token carries down.

    heavy_ball: m = mu m + o, y = gamma m.
    adam: in the first layer only, y = gamma1 p / sqrt(v + 1e-8) with p = (1 - b1) o, v = (1 - b2) o^2; m is filled
    beside it and all later layers are heavy-ball.
    robust: p = mu p + o, and the stream carries the points y_t = x_t + a gamma p_{t-1} where the gradient is taken:
    y = gamma ((1 + a) p - a p_before). It ends at x + a gamma p of the last layer.

    m is zero in the first layer of every forward, and its own per position: decoding needs no cache. Layers without
    momentum between two of these must hand the carry on (MoE does). `sign=-1` is the released code's x - m; +1 has the
    sign absorbed in the experts, as a pre-norm block needs. The card's v and p are read in one layer and not carried.
    """

    needs = frozenset({"carry"})

    def __init__(
        self,
        dim: int,
        experts: int = 16,
        router: str | Router = "topk",
        bank: str | ExpertBank | None = None,
        balance: Mapping[str, float] | Iterable[Balancer] = (),
        rule: Rule = "heavy_ball",
        mu: float = 0.7,
        gamma: float = 1.0,
        gamma1: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        condition: float = 4.0,
        smoothness: float = 1.0,
        rho: float = 0.5,
        sign: float = 1.0,
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        if rule not in ("heavy_ball", "adam", "robust"):
            raise BadInput(f"rule={rule!r}: one of heavy_ball, adam, robust")
        if router == "topk":
            router_options = {"convention": "topk_softmax", **(router_options or {})}
        super().__init__(
            dim,
            experts,
            router,
            bank,
            balance=balance,
            causal=causal,
            host=host,
            router_options=router_options,
            bank_options=bank_options,
        )
        self.rule, self.sign, self.gamma1, self.betas = rule, sign, gamma1, betas
        self.mu, self.gamma, self.ahead = mu, gamma, 0.0
        if rule == "robust":
            self.gamma, self.mu, self.ahead = robust_constants(condition, smoothness, rho)

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        carry = ctx.need("carry", "momentum")
        o, routing = super().forward(x, ctx)
        y, momentum = self.combine(o, carry.get("momentum"))
        return y, routing.replace(carry={**carry, "momentum": momentum})

    def combine(self, o: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor]:
        """y and the new momentum from the layer's output and the old momentum (None in the first layer)."""
        before = torch.zeros_like(o) if momentum is None else momentum
        after = self.mu * before + o
        if self.rule == "adam" and momentum is None:
            p, v = (1 - self.betas[0]) * o, (1 - self.betas[1]) * o.square()
            return self.sign * self.gamma1 * p * torch.rsqrt(v + 1e-8), after
        return self.sign * self.gamma * ((1 + self.ahead) * after - self.ahead * before), after
