"""Maestro's layer: low-rank experts under a hierarchical group lasso."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from moesaic.balancing.balancer import Balancer
from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.experts.maestro import Maestro
from moesaic.layers.moe import MoE
from moesaic.routing.router import Router


@register("layers", "maestro", paper="2308.14929", card="layers-and-balancing.md#maestro")
class MaestroLayer(MoE):
    """A router over the `maestro` bank; in training `loss/lasso` is `lam` times the lasso divided by the bank's size.

    Dividing by the number of parameters keeps one `lam` from pruning small layers first. A training step adds the
    loss of a second forward inside `RankSampler.of(model).step()`, against the targets or the full output's detached
    softmax; shrink once per epoch.
    """

    bank: Maestro

    def __init__(
        self,
        dim: int,
        experts: int = 8,
        router: str | Router = "topk",
        width: int | None = None,
        lam: float = 5e-3,
        balance: Mapping[str, float] | Iterable[Balancer] = (),
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
    ):
        bank = Maestro(dim, experts, width)
        super().__init__(dim, experts, router, bank, balance=balance, causal=causal, host=host, router_options=router_options)
        self.lam = lam

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        y, routing = super().forward(x, ctx)
        if ctx.training and self.lam:
            size = sum(p.numel() for p in self.bank.parameters())
            routing = routing.replace(aux={**routing.aux, "loss/lasso": self.lam * self.bank.lasso() / size})
        return y, routing
