"""Chain-of-Experts: the same experts several times in a row, with a router of its own each time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balancing.sequence import Sequence
from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.experts.shared import SharedExperts
from moesaic.layers.layer import summed_losses
from moesaic.layers.moe import MoE
from moesaic.routing.router import Router


@register("layers", "chain_of_experts", paper="2506.18945", card="layers-and-balancing.md#coe")
class ChainOfExperts(MoE):
    """x_t = sum over the k / passes best of pass t of g E_e(x_{t-1}) + shared(x_{t-1}) + x_{t-1}, t = 1 .. passes.

    One bank for all passes, no norm between them, softmax weights that are not renormalised, the shared expert in
    every pass (so it runs `passes` times: not iso-FLOP with a single pass). `inner` adds x_{t-1}; `outer` has the
    host add the stream. The released configuration, our default, is inner on and outer off: x_C, made from the
    normalised input, takes the place of the stream, so one pass of it is no plain block. That is `inner=False,
    outer=True`. `separate=False` shares one router. A sequence-level loss `alpha` per pass, summed, when the host
    gives sequences. The routing holds the passes' slots side by side and each pass in `passes`.
    """

    def __init__(
        self,
        dim: int,
        experts: int = 63,
        router: str = "topk",
        bank: str | None = None,
        k: int = 8,
        passes: int = 2,
        width: int | None = None,
        shared: int = 1,
        inner: bool = True,
        outer: bool = False,
        separate: bool = True,
        alpha: float = 1e-3,
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        width = dim if width is None else width
        if passes < 1 or k % passes:
            raise BadInput(f"passes={passes} does not divide k={k}: every pass runs k / passes experts")
        options = {**({"convention": "softmax"} if router == "topk" else {}), **(router_options or {}), "k": k // passes}
        build = registry.get("routing", router).build
        super().__init__(
            dim,
            experts,
            build(dim, experts, **options),
            bank,
            SharedExperts(dim, width, shared) if shared else None,
            [Sequence(alpha)] if alpha else [],
            causal=causal,
            host=host,
            bank_options={"width": width, **(bank_options or {})},
        )
        if self.router.keyed:
            raise BadInput(f"{router} lists no experts: a chain needs their slots")
        self.later = nn.ModuleList(build(dim, experts, **options) for _ in range(passes - 1) if separate)
        self.passes, self.inner, self.residual = passes, inner, outer

    def routers(self) -> list[Router]:
        """The router of each pass."""
        later = list(self.later) or [self.router] * (self.passes - 1)
        return [self.router, *later]  # type: ignore[list-item]

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD = x.reshape(-1, x.shape[-1])
        passes: list[Routing] = []
        for visit, router in enumerate(self.routers()):
            seen = ctx.replace(previous=passes[-1].state if passes else ctx.previous, memo={})
            if self.bank.shows_activations:
                seen = seen.replace(activations=partial(self.bank.activations, memo=seen.memo))
            routing = router(x_TD, seen)
            if ctx.training and ctx.sequence_ids is not None and self.balancers:
                routing = self._balance(routing, ctx, visit)
            y_TD = self._run(x_TD, routing, seen)
            if self.shared is not None:
                y_TD = y_TD + self.shared(x_TD)
            x_TD = y_TD + x_TD if self.inner else y_TD
            passes.append(routing)
        return x_TD.reshape(x.shape), side_by_side(passes).replace(carry=ctx.carry)


def side_by_side(passes: list[Routing]) -> Routing:
    """One routing with the slots of all passes: logits and state are the last one's, losses of one name are summed."""
    last = passes[-1]
    aux = summed_losses(passes)
    if last.experts_TK is None:
        return last.replace(aux=aux, passes=tuple(passes))

    def join(name: str) -> Tensor | None:
        parts = [getattr(r, name) for r in passes]
        return None if parts[0] is None else torch.cat(parts, 1)

    return last.replace(
        experts_TK=join("experts_TK"),
        weights_TK=join("weights_TK"),
        selected_TK=join("selected_TK"),
        dropped_TK=join("dropped_TK"),
        aux=aux,
        passes=tuple(passes),
    )
