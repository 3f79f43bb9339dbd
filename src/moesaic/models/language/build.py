"""From a configuration to one block's feed-forward part: a registered MoE layer, or a dense MLP."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moesaic.balancing.scope import Counting
from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.experts.shared import SharedExperts
from moesaic.layers.moe import MoE
from moesaic.models.language.config import MoesaicConfig

HOST = frozenset({"previous", "carry", "attention", "token_ids", "positions", "sequence_ids", "mask", "step", "generator"})
"""What the model gives to every router by itself; `config.gives` adds what its caller promises."""

GIVEN = {"dim", "experts", "causal", "host", "router_options", "bank_options"}
"""Parameters of a layer that other fields of the configuration set, and `layer_options` does not."""


def layer_class(config: MoesaicConfig) -> tuple[Callable[..., nn.Module], dict[str, inspect.Parameter]]:
    """What builds a MoE layer, and its parameters: the registered `layer`, or the plain one."""
    if config.layer is None:
        return MoE, dict(inspect.signature(MoE).parameters)
    entry = registry.get("layers", config.layer)
    return entry.build, entry.parameters


def router_name(config: MoesaicConfig) -> str | None:
    """The configured router, else the layer's default; None when the layer makes its own and takes no name."""
    parameters = layer_class(config)[1]
    default = parameters["router"].default if "router" in parameters else None
    if config.router is not None and "router" not in parameters:
        raise BadInput(f"router={config.router}: layer {config.layer} brings its own; leave router out")
    return config.router or (default if isinstance(default, str) else None)


def shared_modules(config: MoesaicConfig) -> dict[str, nn.Module]:
    """Modules that all routers of the model share (RMoE's GRU)."""
    name = router_name(config) if config.moe_layers() else None
    if name is None:
        return {}
    entry = registry.get("routing", name)
    options = router_options(config, config.moe_layers()[0])
    own = {key: value for key, value in options.items() if key in entry.parameters}
    return entry.build.shared(config.hidden_size, **own)  # type: ignore[attr-defined]


def k_of(config: MoesaicConfig, index: int) -> int | None:
    return config.k[config.moe_layers().index(index)] if isinstance(config.k, list) else config.k


def router_options(config: MoesaicConfig, index: int) -> dict[str, Any]:
    """Options of the router of layer `index`: the model's, its own (`per_layer`), k and the vocabulary where it asks."""
    of_layer = {key: value for key, value in (config.per_layer or {}).get(str(index), {}).items() if key != "layer_options"}
    options = {**(config.router_options or {}), **of_layer}
    name = router_name(config)
    parameters = {} if name is None else registry.get("routing", name).parameters
    k = k_of(config, index)
    if k is not None and "k" in parameters:
        options.setdefault("k", k)
    elif k is not None and "k" not in layer_class(config)[1]:
        raise BadInput(f"k={k}: router {name} has no k; its options are {', '.join(list(parameters)[2:]) or 'none'}")
    if "vocab_size" in parameters:
        options.setdefault("vocab_size", config.vocab_size)
    return options


def moe_layer(config: MoesaicConfig, index: int, shared: Mapping[str, nn.Module]) -> nn.Module:
    """The MoE layer of block `index`. Raises BadInput or MissingNeed for what cannot be combined."""
    build, parameters = layer_class(config)
    name = router_name(config)
    given: dict[str, Any] = {"causal": config.causal, "host": HOST | set(config.gives or [])}
    if config.layer is not None:  # the plain layer has neither; its router and its bank get them
        given |= {"k": k_of(config, index), "width": config.expert_width}
    optional = set(given)
    given |= {"balance": config.balance or None, "bank": config.bank, "router": name}
    given["router_options"] = {**router_options(config, index), **shared} if name else config.router_options
    given["bank_options"] = _bank_options(config, name, parameters)
    if config.shared_experts:
        given["shared"] = _shared_experts(config, parameters)
    for field, value in given.items():
        if value and field not in parameters and field not in optional:
            raise BadInput(f"{field}: layer {config.layer} has no such part to set; leave it out")
    own = {**(config.layer_options or {}), **(config.per_layer or {}).get(str(index), {}).get("layer_options", {})}
    for field in own:
        if field not in parameters or field in GIVEN:
            raise BadInput(
                f"layer_options.{field}: layer {config.layer} has no such option: {', '.join(sorted(set(parameters) - GIVEN))}"
            )
    given = {field: value for field, value in given.items() if value is not None and field in parameters}
    try:
        layer = build(config.hidden_size, config.experts, **{**given, **own})
    except TypeError as error:  # an option that the router's or the bank's signature does not have
        raise BadInput(f"layer {index}: {error}") from error
    for part in layer.modules():
        if isinstance(part, MoE):
            part.counting = Counting(config.balance_scope)
    return layer


def _bank_options(config: MoesaicConfig, router: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    options = dict(config.bank_options or {})
    bank = config.bank
    if bank is None and router is not None and "bank" in parameters:
        bank = registry.get("routing", router).build.bank  # type: ignore[attr-defined]
    if bank is not None and "width" in registry.get("experts", bank).parameters and "width" not in parameters:
        options.setdefault("width", config.expert_width)
    return options


def _shared_experts(config: MoesaicConfig, parameters: Mapping[str, inspect.Parameter]) -> nn.Module | int:
    """Shared experts as the layer takes them: a module, or how many."""
    if "shared" in parameters and parameters["shared"].annotation == "int":
        return config.shared_experts
    assert config.shared_width is not None
    return SharedExperts(config.hidden_size, config.shared_width, config.shared_experts)


def dense_layer(config: MoesaicConfig) -> SharedExperts:
    """One SwiGLU of `intermediate_size`."""
    assert config.intermediate_size is not None
    return SharedExperts(config.hidden_size, config.intermediate_size)


def needs_of(module: nn.Module) -> frozenset[str]:
    """Everything that the routers and layers inside ask of their host."""
    return frozenset(name for part in module.modules() for name in getattr(part, "needs", ()))


def why_no_cache(module: nn.Module) -> str:
    """Why one of the routers or layers inside cannot decode one token at a time (its `no_cache`); empty when all can."""
    return next((reason for part in module.modules() if (reason := getattr(part, "no_cache", ""))), "")
