"""Find MoE blocks by what their modules are, never by class name.

An experts module holds stacked weights (`down_proj`, [E, ., .]) and the layout flags that transformers' experts
decorator sets on it. Its parent is the block. The router is the sibling that the model records router logits from, or,
where the model records none, the smallest sibling that has a row per expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from moesaic.core.errors import BadInput


class Found(NamedTuple):
    """One MoE block of a model: where it is and the modules it is made of."""

    name: str
    layer: int
    parent: nn.Module
    experts: nn.Module
    router: nn.Module | None
    shared: nn.Module | None


def is_experts(module: nn.Module) -> bool:
    """Whether the module is a bank behind transformers' one experts call."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, Tensor) and down.dim() == 3 and hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def find(model: nn.Module) -> Iterator[Found]:
    """Every MoE block of the model, in the order its modules are defined."""
    recorded = tuple(_recorded_router_classes(model))
    modules = dict(model.named_modules())
    for name, experts in modules.items():
        if not is_experts(experts):
            continue
        path = name.rpartition(".")[0]
        parent = modules[path]
        router = _router(parent, experts, recorded)
        shared = _shared(parent, experts) or (_shared(modules[path.rpartition(".")[0]], parent) if path else None)
        yield Found(path or name, layer_of(name), parent, experts, router, shared)


def expert_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of each stacked matrix -> number of its block, and 0 (first product) or 1 (second).

    Raises BadInput for a model whose experts are a bank of our own layers.
    """
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for block, place in enumerate(find(model)):
        experts: Any = place.experts
        if not {"down_proj", "gate_up_proj", "up_proj"} & set(experts._parameters):
            if hasattr(experts, "factors"):
                raise BadInput(
                    f"{place.name}: its experts are factors: they run from memory as they are, and are not packed, rounded, "
                    "streamed or operated on again; do that before, or make them with store=dense, which multiplies them out"
                )
            raise BadInput(
                f"{place.name}: its experts are a bank of a moesaic layer; packing, quantising and streaming know "
                "transformers' own layout only"
            )
        for which, matrix in enumerate(("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")):
            found[f"{names[experts]}.{matrix}".lstrip(".")] = (block, which)
    return found


def layer_of(name: str) -> int:
    """The last number in a dotted name: the layer a module lives in (0 where the name holds none)."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
    return int(numbers[-1]) if numbers else 0


def _recorded_router_classes(model: nn.Module) -> Iterator[type]:
    for module in model.modules():
        recorders = getattr(module, "_can_record_outputs", None)
        if not isinstance(recorders, dict) or "router_logits" not in recorders:
            continue
        given = recorders["router_logits"]
        for recorder in given if isinstance(given, list | tuple) else [given]:
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                yield target


def _router(parent: nn.Module, experts: Any, recorded: tuple[type, ...]) -> nn.Module | None:
    siblings = [child for child in parent.children() if child is not experts]
    for child in siblings:
        if isinstance(child, recorded):
            return child
    num_experts = experts.down_proj.shape[0]
    scoring = [child for child in siblings if any(p.dim() == 2 and p.shape[0] >= num_experts for p in child.parameters())]
    # Dense siblings have as many rows too, and more matrices; some routers also score shared experts, so rows may exceed E.
    return min(scoring, key=lambda child: sum(p.numel() for p in child.parameters()), default=None)


def _shared(parent: nn.Module, beside: nn.Module) -> nn.Module | None:
    """The always-on expert beside the routed ones: an MLP (two matrices or more) that its owner calls shared."""
    for name, child in parent.named_children():
        if child is not beside and "shared" in name and sum(p.dim() >= 2 for p in child.parameters()) >= 2:
            return child
    return None
