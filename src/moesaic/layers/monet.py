"""Monet: 262,144 experts by composing two keyed halves, with a router that several layers share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from moesaic.balancing.balancer import Balancer
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.experts.monet import half_count
from moesaic.layers.moe import MoE
from moesaic.routing.keyed import KeyedRouter


@register("layers", "monet", paper="2412.04139", card="layers-and-balancing.md#monet", needs={"carry"})
class Monet(MoE):
    """A keyed router over a bank of n * n experts; `first=False` has no router and runs the gates of the layer above.

    In the paper every 4th layer is a first one. The gates travel in the carry under "monet": a pipeline that cuts a group
    of layers must send them. Losses (uniformity and ambiguity, 1e-3 each) are the first layer's. In training the
    threshold sees the batch; evaluation uses the running statistics.
    """

    needs = frozenset({"carry"})

    def __init__(
        self,
        dim: int,
        experts: int = 512 * 512,
        heads: int = 8,
        k: int | None = None,
        first: bool = True,
        balance: Mapping[str, float] | Iterable[Balancer] | None = None,
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        router = KeyedRouter(dim, half_count(experts), heads, k)
        balance = {"uniformity": 1e-3, "ambiguity": 1e-3} if balance is None else balance
        super().__init__(
            dim, experts, router, balance=balance if first else (), causal=causal, host=host, bank_options=bank_options
        )
        if not first:
            del self.router

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        carry = ctx.need("carry", "monet")
        if hasattr(self, "router"):
            y, routing = super().forward(x, ctx)
            return y, routing.replace(carry={**carry, "monet": routing.replace(aux={})})
        routing = carry.get("monet")
        if routing is None:
            raise BadInput("monet: first=False runs the gates of a layer above, and none gave any: make this a first one")
        x_TD = x.reshape(-1, x.shape[-1])
        return self._run(x_TD, routing, ctx).reshape(x.shape), routing.replace(carry=carry)
