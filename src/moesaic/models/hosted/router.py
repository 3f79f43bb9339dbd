"""A registered router where a transformers block expects its own: x in, (logits, weights, ids) out, in the block's order.

Shape legend: T tokens, D width, E the block's experts, K slots.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Scope
from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.core.recompute import recomputing
from moesaic.core.routing import Routing
from moesaic.models.hosted.calls import Calls
from moesaic.routing.router import Router
from moesaic.view import implementation


class HostedRouter(nn.Module):
    """Takes the place of a block's router. `rows` are the ids that its experts call can serve, `experts` the block's own.

    The tuple holds logits of the block's own experts only: further rows (null or cheap experts) stay in `Calls.routings`,
    where balance losses and who counts experts find the whole Routing.
    """

    def __init__(
        self,
        router: Router,
        calls: Calls,
        settings: Any,
        *,
        order: tuple[str, ...],
        experts: int,
        rows: int,
        layer: int,
        balance: dict[str, Any],
    ) -> None:
        nn.Module.__init__(self)
        self.router = router
        self.order, self.num_experts, self.rows, self.layer = order, experts, rows, layer
        self.top_k = router.k
        self.config = settings
        self.calls = calls
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.balancers = {name: _balancer(name, value, router) for name, value in balance.items()}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        needs = self.router.needs
        step = int(self.step) if "step" in needs else 0
        ctx = self.calls.context(len(x_TD), self.training, self.layer, step, needs, x_TD.device)
        routing = self.router(x_TD, ctx)
        self.calls.previous = routing.state
        self.calls.routings[self.layer] = self._balanced(routing, Scope(ctx.mask, ctx.sequence_ids))
        assert routing.experts_TK is not None and routing.weights_TK is not None, "checked when it was installed"
        ids_TK, weights_TK = routing.experts_TK, routing.weights_TK
        if getattr(self.config, "_experts_implementation", None) != implementation.NAME and self.rows == self.num_experts:
            ids_TK = ids_TK.clamp(min=0)  # only our kernels skip an empty slot; its weight is 0
        parts = {"logits": routing.logits_TE[:, : self.num_experts], "weights": weights_TK, "ids": ids_TK}
        return tuple(parts[name] if name == "ids" else parts[name].to(x_TD.dtype) for name in self.order)

    def _balanced(self, routing: Routing, scope: Scope) -> Routing:
        if not self.training or not self.balancers:
            return routing
        losses = {}
        for name, balancer in self.balancers.items():
            if not recomputing():
                balancer.observe(routing, scope)
            value = balancer.loss(routing, scope)
            if value is not None:
                losses[f"loss/{name}"] = balancer.coefficient * value
        return routing.replace(aux={**routing.aux, **losses})

    def after_step(self) -> None:
        self.step += 1
        for balancer in self.balancers.values():
            balancer.after_step()


@cache
def hosted_class(own: type) -> type:
    """HostedRouter as a subclass of the block's router class, which transformers records router logits from."""
    return type(f"Hosted{own.__name__}", (HostedRouter, own), {})


def _balancer(name: str, value: Any, router: Router) -> Balancer:
    entry = registry.get("balancing", name)
    options = value if isinstance(value, dict) else {("rate" if "rate" in entry.parameters else "coefficient"): value}
    try:
        balancer: Balancer = entry.build(**options)
    except TypeError as error:
        raise BadInput(f"balance {name}: {error}") from error
    balancer.bind(router)
    return balancer
