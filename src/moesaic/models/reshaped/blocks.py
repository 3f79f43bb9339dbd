"""Give the blocks of a model their own numbers of experts and router rows, and let rows share experts.

A block of F experts is taken from a model of the same architecture that has F in all its blocks, so that no module is rebuilt
by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import install
from moesaic.view.discover import Found, find
from moesaic.view.resize import resize
from moesaic.view.shared_rows import share


def reshape(model: Any, blocks: dict[str, dict[str, Any]]) -> None:
    """`blocks`: name of each MoE block -> experts, rows, map (None: row r runs expert r), form of factors. Raises BadInput."""
    found = {block.name: block for block in find(model)}
    for name in blocks:
        if name not in found:
            raise BadInput(f"config.json: surgery names a block {name!r}; this architecture has {', '.join(found)}")
    made: dict[int, dict[str, Found]] = {}
    bare = plain(model)

    def sized(count: int) -> dict[str, Found]:
        if count not in made:
            made[count] = {block.name: block for block in find(resize(bare, experts=count).model)}
        return made[count]

    modules = dict(model.named_modules())
    place = next(model.parameters()).device
    for name, spec in blocks.items():
        experts, rows = int(spec["experts"]), int(spec["rows"])
        own = found[name]
        new: Any = sized(rows)[name].parent
        if experts != rows:
            leaf = next(leaf for leaf, child in new.named_children() if child is sized(rows)[name].experts)
            setattr(new, leaf, sized(experts)[name].experts)
        new = new if place.type == "meta" else new.to_empty(device=place)
        path, _, leaf = name.rpartition(".")
        if modules[name] is not own.parent or not path:
            raise BadInput(f"{name}: its experts stand in no module of their own, and cannot be given another size")
        setattr(modules[path], leaf, new)
        for module in new.modules():
            if hasattr(module, "config"):
                module.config = model.config  # it names the implementation of experts that is asked for
        if spec.get("form") is not None:
            install(_experts(new), spec["form"])
        if spec.get("map") is not None:
            held = [int(e) for e in spec["map"]]
            if len(held) != rows or not 0 <= min(held) <= max(held) < experts:
                raise BadInput(
                    f"config.json: surgery maps {len(held)} of {rows} rows to experts up to {max(held)} of {experts}"
                )
            share(_experts(new), held)


def plain(model: Any) -> Any:
    """A stand-in of the architecture's own class, to be resized: type and configuration."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    models: Any = AutoModelForCausalLM._model_mapping
    base: Any = CONFIG_MAPPING[model.config.base_model_type]
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "surgery", "base_model_type")}
    with torch.device("meta"):
        return models[base]._from_config(base(**values))


def _experts(parent: nn.Module) -> nn.Module:
    return next(find(parent)).experts
