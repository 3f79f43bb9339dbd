"""Balance losses on the routers of any transformers MoE: registered methods, one instance per layer, through the view.

Shape legend: L MoE layers, E experts, T tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer
from moesaic.balancing.scope import Counting
from moesaic.core.errors import BadInput, MoesaicError, NotMoE
from moesaic.core.registry import Entry, get
from moesaic.core.routing import Routing


class OwnBalance:
    """`Balance` of a model that routes and balances by itself: one whose decoder returns `routings`, and whose
    configuration has taken in the recipe's `balance`. Its losses come with their coefficients, summed over layers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers = len(model.config.moe_layers())
        self.coefficients: dict[str, float] = dict.fromkeys(model.config.balance, 1.0)
        self._routings: tuple[Routing, ...] = ()
        self._handle = model.get_decoder().register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._routings = output.routings

    def losses(self, sequences: int, training: bool) -> dict[str, Tensor]:
        """Each method's share of the loss in the last forward pass; none in evaluation."""
        found: dict[str, list[Tensor]] = {}
        for routing in self._routings:
            for key, value in routing.aux.items():
                if key.startswith("loss/"):
                    found.setdefault(key.removeprefix("loss/"), []).append(value)
        for name in found:
            self.coefficients.setdefault(name, 1.0)
        return {name: torch.stack(parts).sum() for name, parts in found.items()}

    def load(self) -> list[Tensor]:
        """Share of the choices that each router row of each layer got in the last forward pass, [E] per layer."""
        counts = [routing.counts_E() for routing in self._routings if not routing.soft]
        return [counts_E / counts_E.sum().clamp(min=1) for counts_E in counts]

    def clear(self) -> None:
        """Let go of the last forward pass, and of its graph."""
        self._routings = ()

    def after_step(self) -> None:
        self.model.after_step()

    def close(self) -> None:
        self._handle.remove()


def balance_of(model: Any, methods: dict[str, Any], scope: str = "micro_batch") -> Balance | OwnBalance:
    """What balances `model`: itself, or these methods on its routers. Raises BadInput, see Balance."""
    own = hasattr(model, "after_step") and hasattr(model.config, "balance")
    return OwnBalance(model) if own else Balance(model, methods, scope)


class Balance:
    """Listens to every router of `model`; after a forward pass, `losses()` are its balance losses and `load()` its load.

    Args:
        methods: registered name -> coefficient, or -> its parameters as a mapping.
        scope: which tokens the losses count, see `balancing/scope.py`.

    Raises BadInput naming the method that is unknown, does not fit the model, or was asked of a dense model.
    """

    def __init__(self, model: nn.Module, methods: dict[str, Any], scope: str = "micro_batch") -> None:
        from moesaic.view import view

        try:
            blocks: Any = view(model)
        except NotMoE:
            if methods:
                raise BadInput(f"balance: {', '.join(methods)} asked for, but {type(model).__name__} has no experts") from None
            blocks = []
        self.layers = len(blocks)
        self.coefficients = {}
        self._balancers: list[dict[str, Balancer]] = [{} for _ in blocks]
        for name, value in methods.items():
            entry = _entry(name)
            for block, balancers in zip(blocks, self._balancers, strict=True):
                balancers[name] = _build(entry, name, value, block)
            self.coefficients[name] = self._balancers[0][name].coefficient
        self._counting = [Counting(scope) for _ in blocks]
        self._calls: list[Routing | None] = [None] * self.layers
        self._handles = [block.on_route(self._keep(i)) for i, block in enumerate(blocks)]

    def _keep(self, index: int) -> Any:
        def keep(routing: Routing, block: Any) -> None:
            self._calls[index] = routing

        return keep

    def losses(self, sequences: int, training: bool) -> dict[str, Tensor]:
        """Each method's loss of the last forward pass, averaged over layers, without its coefficient."""
        found: dict[str, list[Tensor]] = {}
        for routing, balancers, of_run in zip(self._calls, self._balancers, self._counting, strict=True):
            if routing is None:
                continue
            ids_T = torch.arange(sequences, device=routing.logits_TE.device).repeat_interleave(routing.tokens // sequences)
            counting = of_run if training else Counting()
            scope = counting.scope(sequence_ids=ids_T)
            for name, balancer in balancers.items():
                loss = counting.loss(balancer, routing, scope)
                if loss is not None:
                    found.setdefault(name, []).append(loss)
                if training:
                    balancer.observe(routing, scope)
        return {name: torch.stack(parts).mean() for name, parts in found.items()}

    def load(self) -> list[Tensor]:
        """Share of the choices that each expert of each layer got in the last forward pass, [E] per layer."""
        counts = [routing.counts_E() for routing in self._calls if routing is not None]
        return [counts_E / counts_E.sum().clamp(min=1) for counts_E in counts]

    def clear(self) -> None:
        """Let go of the last forward pass, and of its graph."""
        self._calls = [None] * self.layers

    def after_step(self) -> None:
        for balancers in self._balancers:
            for balancer in balancers.values():
                balancer.after_step()
        for counting in self._counting:
            counting.after_step()

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _entry(name: str) -> Entry:
    try:
        return get("balancing", name)
    except MoesaicError as error:
        raise BadInput(f"balance.{name}: {error}") from error


def _build(entry: Entry, name: str, value: Any, block: Any) -> Balancer:
    """One instance for one layer. A bare number is the coefficient, or a controller's first parameter (its rate)."""
    if not isinstance(value, dict):
        value = {"coefficient" if "coefficient" in entry.parameters else next(iter(entry.parameters)): value}
    try:
        balancer = entry.build(**value).bind(block.router)
        if balancer.output_tokens:
            raise BadInput("it compares the outputs of all experts, which only moesaic's own layers show")
        return balancer
    except (MoesaicError, TypeError, ValueError) as error:
        raise BadInput(f"balance.{name}: {error}") from error


def max_violation(load_E: Tensor) -> float:
    """MaxVio: how far the busiest expert is above the mean load, as a share of the mean (0 = even)."""
    return load_E.max().item() * load_E.numel() - 1


def load_facts(shares: list[Tensor]) -> dict[str, list[float]]:
    """How even the load of each layer is, for the log: from shares [E] that sum to 1, one list entry per layer.

    `max_vio` as above; `load_cv` standard deviation over mean; `load_entropy` in nats over ln E (1 = even);
    `dead_experts`: how many got nothing.
    """
    facts: dict[str, list[float]] = {"max_vio": [], "load_cv": [], "load_entropy": [], "dead_experts": []}
    for share_E in shares:
        experts = share_E.numel()
        entropy = -torch.special.xlogy(share_E, share_E).sum().item()
        facts["max_vio"].append(round(max_violation(share_E), 4))
        facts["load_cv"].append(round((share_E.std(correction=0) * experts).item(), 4))
        facts["load_entropy"].append(round(entropy / math.log(experts), 4) if experts > 1 else 1.0)
        facts["dead_experts"].append(int((share_E == 0).sum()))
    return facts
