"""The MoE layer: route, dispatch, run, combine, add the shared experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer
from moesaic.balancing.scope import Counting
from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.routing import Dispatch, Routing
from moesaic.experts.bank import ExpertBank
from moesaic.layers.experts_call import ExpertsCall
from moesaic.layers.layer import Layer
from moesaic.routing.router import Router


class MoE(Layer):
    """`y, routing = moe(x, ctx)` for x [..., D].

    `router`, `bank` and `balance` take registered names or built objects; names are built from `dim`, `experts` and
    the options mappings; `balance` maps a name to its coefficient (a controller's rate) or to its options. `host` names
    the needs that the surrounding model can give, and `causal` says whether it is a causal one: an impossible combination
    is refused here, not in the first forward. In training the weighted balance losses are in `routing.aux` under
    `loss/NAME`; `balance_scope` says over which tokens they count (`balancing/scope.py`).
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        router: str | Router = "topk",
        bank: str | ExpertBank | None = None,
        shared: nn.Module | None = None,
        balance: Mapping[str, Any] | Iterable[Balancer] = (),
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
        balance_scope: str = "micro_batch",
    ):
        super().__init__()
        if isinstance(router, str):
            router = registry.get("routing", router).build(dim, experts, **(router_options or {}))
        assert isinstance(router, Router)
        if bank is None:
            bank = router.bank
        if isinstance(bank, str):
            bank = registry.get("experts", bank).build(dim, experts, **(bank_options or {}))
        assert isinstance(bank, ExpertBank)
        self.router, self.bank, self.shared = router, bank, shared
        self.experts_call = ExpertsCall(self)
        self.balancers = {name: _balancer(name, value, router) for name, value in _named(balance)}
        self.counting = Counting(balance_scope)
        self._check(causal, host)
        if self.balancers and not self.router.keyed:
            cost_E = self._row_costs()
            for balancer in self.balancers.values():
                balancer.bind_bank(cost_E)

    def _row_costs(self) -> Tensor:
        """FLOPs per token of each router row: its expert's; 0 for rows that no expert serves."""
        cost_E = self.bank.cost_E if self.bank.row_to_expert is None else self.bank.cost_E[self.bank.row_to_expert]
        return torch.cat([cost_E, cost_E.new_zeros(self.router.num_experts - len(cost_E))])

    def _check(self, causal: bool, host: Iterable[str] | None) -> None:
        name = type(self.router).__name__
        if causal and not self.router.causal:
            raise BadInput(f"{name} lets a token's routing see later tokens: not for a causal host")
        self.check_host(type(self.router), self.router.needs - {"activations"}, host)
        self.check_host(type(self), self.needs, host)
        if "activations" in self.router.needs and not self.bank.shows_activations:
            raise MissingNeed(f"{name} needs 'activations': a bank that shows them, such as 'autonomous'")
        runs = getattr(self.router, "true_experts", self.router.num_experts)
        rows = self.bank.num_experts if self.bank.row_to_expert is None else len(self.bank.row_to_expert)
        if runs != rows:
            raise BadInput(f"{name} routes over {runs} experts, the bank serves {rows}")
        if self.router.keyed != self.bank.keyed:
            bank = type(self.bank).__name__
            keyed, other = (name, bank) if self.router.keyed else (bank, name)
            raise BadInput(f"{keyed} works with two keyed halves, {other} does not: the layer 'monet' joins them")

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD = x.reshape(-1, x.shape[-1])
        if self.bank.shows_activations:
            ctx = ctx.replace(activations=partial(self.bank.activations, memo=ctx.memo))
        routing = self.router(x_TD, ctx)
        if ctx.training and self.balancers:
            routing = self._balance(self._with_outputs(x_TD, routing, ctx), ctx)
        y_TD = self._run(x_TD, routing, ctx)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        ctx.memo.clear()
        return y_TD.reshape(x.shape), routing.replace(carry=ctx.carry)

    def _run(self, x_TD: Tensor, routing: Routing, ctx: RoutingContext) -> Tensor:
        if routing.keyed_T2HN is not None:
            return self.bank.run_keyed(x_TD, routing.keyed_T2HN)
        if routing.experts_TK is not None and self.experts_call.bank is not None:
            assert routing.weights_TK is not None
            return self.experts_call(x_TD, routing.experts_TK, routing.weights_TK)
        if not routing.soft:
            dispatch = Dispatch.of(routing, self.bank.row_to_expert, self.bank.num_experts)
            return self.bank.run(x_TD, dispatch, ctx.memo)
        assert routing.merge_GE is not None and routing.group_T is not None
        merged = self.bank.merge(routing.merge_GE)
        ones_T = torch.ones_like(x_TD[:, 0])
        tokens_T = torch.arange(x_TD.shape[0], device=x_TD.device)
        return merged.run(x_TD, Dispatch.sort(tokens_T, routing.group_T, ones_T, len(merged), x_TD.shape[0]))

    def _with_outputs(self, x_TD: Tensor, routing: Routing, ctx: RoutingContext) -> Routing:
        """The routing with the outputs of all experts on a sample of real tokens, for the losses that compare experts.

        The sample is drawn from torch's own stream, which recomputation replays.
        """
        wanted = max(balancer.output_tokens for balancer in self.balancers.values())
        if not wanted:
            return routing
        real_T = torch.arange(len(x_TD), device=x_TD.device) if ctx.mask is None else torch.nonzero(ctx.mask).flatten()
        sample_ND = x_TD[real_T[torch.randperm(len(real_T), device=x_TD.device)[:wanted]]]
        rows, experts = len(sample_ND), self.bank.num_experts
        offsets_E1 = torch.arange(experts + 1, device=x_TD.device) * rows
        y_SD = self.bank(sample_ND.repeat(experts, 1), offsets_E1)
        return routing.replace(aux={**routing.aux, "outputs_END": y_SD.view(experts, rows, -1)})

    def _balance(self, routing: Routing, ctx: RoutingContext, visit: int = 0) -> Routing:
        """The routing with its weighted losses. `visit` numbers the routings of a layer that routes several times."""
        scope = self.counting.scope(ctx.mask, ctx.sequence_ids, visit)
        losses = {}
        for name, balancer in self.balancers.items():
            balancer.observe(routing, scope)
            value = self.counting.loss(balancer, routing, scope)
            if value is not None:
                losses[f"loss/{name}"] = balancer.coefficient * value
        return routing.replace(aux={**routing.aux, **losses})

    def after_step(self) -> None:
        """Call once after every optimiser step: moves the selection biases."""
        for balancer in self.balancers.values():
            balancer.after_step()
        self.counting.after_step()


def _named(balance: Mapping[str, Any] | Iterable[Balancer]) -> list[tuple[str, Any]]:
    if isinstance(balance, Mapping):
        return list(balance.items())
    return [(type(b).__name__.lower(), b) for b in balance]


def _balancer(name: str, value: float | Mapping[str, Any] | Balancer, router: Router) -> Balancer:
    """A registered balancer with its coefficient (a controller's rate) or options, told what it must know of the router."""
    if isinstance(value, Balancer):
        balancer = value
    else:
        entry = registry.get("balancing", name)
        options = value if isinstance(value, Mapping) else {("rate" if "rate" in entry.parameters else "coefficient"): value}
        try:
            balancer = entry.build(**options)
        except TypeError as error:
            raise BadInput(f"balance.{name}: {error}") from error
    balancer.bind(router)
    return balancer
