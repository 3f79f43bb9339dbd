"""Retrofit: another router, or cheap experts, in a trained transformers MoE; the experts stay as they are.

Routers of blocks whose own router is a softmax top-k over one matrix can be replaced; the others are refused with the
reason, for their rows mean something else. New routers start from the old one's rows (`Router.extend`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.models.hosted.classes import Retrofitted, become, config_class
from moesaic.models.hosted.install import Own, Spec, build, check_form, hosted_routers, install, own_router
from moesaic.models.hosted.router import HostedRouter
from moesaic.view.block import Block, View

TRAINS = ("router", "router+experts", "all")

CHEAP = ("mix_C2D", "vector_CD")
"""Parameters of cheap experts, which learn with the router."""


@dataclass
class Plan:
    """What a retrofit will do, known before anything changes."""

    spec: Spec
    own: Own
    rows: int
    starts: bool
    """The new router starts from the old one's rows; else from its own initial weights."""
    stock: bool
    """Once `settle`d, the checkpoint is one that stock transformers loads."""
    reason: str
    parameters_added: int

    def facts(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "router": spec.router,
            "router_options": spec.router_options,
            "bank": spec.bank or "as it is",
            "bank_options": spec.bank_options,
            "balance": spec.balance,
            "layers": spec.layers,
            "starts_from_old_rows": self.starts,
            "parameters_added": self.parameters_added,
            "stock": self.stock,
            "loads_with": "transformers" if self.stock else "transformers after `import moesaic`",
            "reason": self.reason,
        }


@dataclass
class Before:
    """What a retrofit replaced: routers by block, classes, and the hook it added."""

    routers: list[tuple[Block, Any]]
    model_class: type
    config_class: type
    hook: Any


@dataclass
class Retrofit:
    """A retrofitted model: train it, then `settle()` and `save_pretrained`."""

    model: Any
    plan: Plan
    before: Before

    def settle(self) -> Any:
        """The model to save. Where evaluation is the architecture's own routing, its own routers come back, with the
        trained rows, and nothing of the retrofit is left; else the model as it is."""
        return self.hand_back() if self.plan.stock else self.model

    @torch.no_grad()
    def hand_back(self) -> Any:
        """The model with its own routers, which take over the trained rows: the architecture's top-k, whatever trained it."""
        before, config = self.before, self.model.config
        for block, old in before.routers:
            name, hosted = _hosted_in(block)
            plain, score = hosted.router.as_top_k(), cast(Any, hosted.router.score)
            rows_ED = score.weight if plain is None else plain[0]
            matrix = next(p for p in old.parameters() if p.numel() > 1)
            if matrix.shape != rows_ED.shape:
                raise BadInput(f"{block.name}: {len(rows_ED)} router rows for {len(matrix)} experts")
            matrix.data = rows_ED.detach().clone()
            setattr(block.parent, name, old)
        self.model.__class__, config.__class__ = before.model_class, before.config_class
        for name in ("retrofit", "base_model_type"):
            config.__dict__.pop(name, None)
        before.hook.remove()
        del self.model._hosted_calls
        return self.model


def plan_retrofit(
    model: Any,
    router: str = "topk",
    *,
    router_options: Mapping[str, Any] | None = None,
    bank: str | None = None,
    bank_options: Mapping[str, int] | None = None,
    balance: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
) -> tuple[Plan, list[Block]]:
    """Check everything that can be known and change nothing. Arguments as of `retrofit`, which raises what this raises."""
    if not hasattr(model, "get_decoder") or model.get_decoder() is model:
        raise BadInput(f"{type(model).__name__} is no causal language model with a decoder: a retrofit needs one")
    if isinstance(model, Retrofitted):
        raise BadInput(
            f"this model was retrofitted ({_what(cast(Any, model).config.retrofit)}) already: start from the one before"
        )
    config_class(cast(Any, type(model.config)))
    blocks = _chosen(View(model), layers)
    owns = [own_router(block) for block in blocks]
    own = owns[0]
    if len({(o.k, o.normalised, tuple(o.weight_ED.shape)) for o in owns}) > 1:
        raise BadInput("the blocks differ in experts, experts per token or normalising: retrofit them apart with layers")
    parameters = registry.get("routing", router).parameters
    options: dict[str, Any] = {}
    if "k" in parameters:
        options["k"] = own.k
    if "renormalise" in parameters:
        options["renormalise"] = own.normalised
    if "convention" in parameters:
        options["convention"] = "renormalised" if own.normalised else "softmax"
    if "vocab_size" in parameters:
        options["vocab_size"] = model.config.get_text_config().vocab_size
    options |= router_options or {}
    spec = Spec(router, options, bank, dict(bank_options or {}), dict(balance or {}), [b.layer for b in blocks])
    spec.orders = [list(o.order) for o in owns]
    experts, dim = own.weight_ED.shape
    with torch.random.fork_rng(devices=[]):
        made, rows = build(spec, dim, experts)
        check_form(made, router, dim)
        starts = made.extend(own.weight_ED)
    stock, reason = _stock(made, own, spec, rows)
    cheap = 3 * dim * spec.bank_options.get("constants", 1) if rows > experts else 0
    added = (sum(p.numel() for p in made.parameters()) + cheap - own.weight_ED.numel()) * len(blocks)
    return Plan(spec, own, rows, starts, stock, reason, 0 if stock else added), blocks


def retrofit(model: Any, router: str = "topk", **how: Any) -> Retrofit:
    """Put a registered router into a live transformers MoE, in place.

    Args:
        model: a causal language model, or what `moesaic.load` gave.
        router: a registered router. Options that the model decides (k, whether weights are normalised, vocabulary) are
            the model's unless given in `router_options`.
        bank: None for the router's own; "zero_computation" puts constants, copies and zeros behind the experts
            (`bank_options`: how many of each).
        balance: balancing method -> coefficient (a controller's rate) or options: part of the model's training loss.
        layers: numbers of the layers to change; all by default.

    Raises BadInput or MissingNeed, with the reason, before anything changes.
    """
    model = getattr(model, "model", model) if isinstance(model, tuple) else model
    plan, blocks = plan_retrofit(model, router, **how)
    replaced, classes = [(block, block.router) for block in blocks], (type(model), type(model.config))
    hook = install(model, blocks, plan.spec, _start)
    become(model, plan.spec.to_dict())
    return Retrofit(model, plan, Before(replaced, *classes, hook))


def check_trains(option: str, train: str) -> None:
    if train not in TRAINS:
        raise BadInput(f"{option} {train!r}: one of {', '.join(TRAINS)}")


def learns(model: Any, train: str) -> list[Any]:
    """The parameters of a retrofitted model that `train` (one of TRAINS) names."""
    if train == "all":
        return list(model.parameters())
    routers = hosted_routers(model)
    blocks = [block for block in View(model) if block.router in routers]
    experts = [p for block in blocks for name, p in block.experts.named_parameters() if train != "router" or name in CHEAP]
    return [*(p for router in routers for p in router.parameters()), *experts]


def _start(router: Any, block: Block) -> None:
    router.extend(own_router(block).weight_ED)


def _what(spec: Mapping[str, Any]) -> str:
    return str(spec.get("router") or spec.get("bank"))


def _chosen(view: View, layers: Iterable[int] | None) -> list[Block]:
    if layers is None:
        return list(view)
    wanted, known = list(layers), {block.layer: block for block in view}
    for layer in wanted:
        if layer not in known:
            raise BadInput(f"layers: no MoE block in layer {layer}; those are {', '.join(map(str, sorted(known)))}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise BadInput(f"layers {wanted}: name each layer once, and at least one")
    return [known[layer] for layer in sorted(wanted)]


def _stock(router: Any, own: Own, spec: Spec, rows: int) -> tuple[bool, str]:
    found: tuple[Tensor, bool] | None = router.as_top_k()
    if rows > len(own.weight_ED):
        return False, "the architecture has no zero-computation experts"
    if found is None or "bias" in spec.balance:
        return False, f"the architecture has no router like {spec.router} in evaluation"
    if router.k != own.k or found[1] != own.normalised:
        return False, f"k or normalising differs from the model's ({own.k}, {'' if own.normalised else 'not '}normalised)"
    return True, "in evaluation it is the architecture's own top-k"


def _hosted_in(block: Block) -> tuple[str, HostedRouter]:
    return next((name, child) for name, child in block.parent.named_children() if isinstance(child, HostedRouter))
