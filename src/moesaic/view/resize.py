"""A model's configuration with another number of experts or another expert width, and a model of it without memory.

Which field of a configuration holds a number is not looked up by architecture: a field that holds the old number is set to
the new one in a copy, a model without memory is built from it, and its blocks tell.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from moesaic.core.errors import BadInput
from moesaic.view.discover import find


class Resized(NamedTuple):
    """A configuration of other sizes, a model of it without memory, and the fields that were set."""

    config: Any
    model: Any
    fields: dict[str, int]


def resize(model: Any, experts: int | None = None, inner: int | None = None) -> Resized:
    """`model` with so many experts in every block, each so wide.

    Raises BadInput where no field of the configuration does just that.
    """
    config, fields = copy.deepcopy(model.config), dict[str, int]()
    blocks: list[Any] = list(find(model))
    if experts is not None:
        old = _only(blocks, [block.experts.down_proj.shape[0] for block in blocks], "experts")
        config = _set(model, config, old, experts, r"expert", fields, lambda made: made.experts.down_proj.shape[0])
    if inner is not None:
        old = _only(blocks, [_inner(block.experts) for block in blocks], "inner widths")
        config = _set(model, config, old, inner, r"intermediate|ffn|inner|mlp_dim", fields, lambda made: _inner(made.experts))
    return Resized(config, build(type(model), config), fields)


def build(model_class: Any, config: Any) -> Any:
    """A model without memory."""
    with torch.device("meta"):
        return model_class._from_config(copy.deepcopy(config)) if hasattr(model_class, "_from_config") else model_class(config)


def _inner(experts: Any) -> int:
    return experts.down_proj.shape[1 if experts.is_transposed else 2]


def _only(blocks: Sequence[Any], values: list[int], what: str) -> int:
    if len(set(values)) > 1:
        one = next(block for block, value in zip(blocks, values, strict=True) if value != values[0])
        raise BadInput(f"{one.name} and {blocks[0].name} differ in {what} ({sorted(set(values))}): no one field sets both")
    return values[0]


def _set(model: Any, config: Any, old: int, new: int, pattern: str, fields: dict[str, int], size: Any) -> Any:
    """The configuration in which every field whose change brings blocks to the new size holds it."""
    if old == new:
        return config
    count = len(list(find(model)))
    for path, name in _candidates(config, old, pattern):
        tried = copy.deepcopy(config)
        setattr(_at(tried, path), name, new)
        try:
            made = build(type(model), tried)
        except Exception:  # a field that other sizes hang on: not the one
            continue
        sizes = [size(block) for block in find(made)]
        if sizes != [new] * count:
            continue
        if _only_blocks_changed(model, made):
            fields[".".join([*path, name])] = new
            return tried
        for place, shared, value in _shared_counts(tried, old, new):
            other = copy.deepcopy(tried)
            setattr(_at(other, place), shared, value)
            if _only_blocks_changed(model, build(type(model), other)):
                fields |= {".".join([*path, name]): new, ".".join([*place, shared]): value}
                return other
    raise BadInput(f"{type(model).__name__}: no field of its configuration changes {old} to {new} in its experts alone")


def _only_blocks_changed(model: Any, made: Any) -> bool:
    """Whether all tensors of other shapes are in blocks, and in no shared expert."""
    blocks = [(name, block) for block in find(model) for name, module in model.named_modules() if module is block.parent]
    shared = {id(p) for _, block in blocks if block.shared is not None for p in block.shared.parameters()}
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    after = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    prefixes = tuple(f"{name}." if name else "" for name, _ in blocks)
    changed = [name for name, tensor in before.items() if name in after and after[name].shape != tensor.shape]
    return all(name.startswith(prefixes) and id(before[name]) not in shared for name in changed)


def _shared_counts(config: Any, old: int, new: int) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Numbers of shared experts with which these keep their width in all, where that is so many times a routed one's."""
    parts: list[tuple[tuple[str, ...], Any]] = [((), config)]
    parts += [((name,), getattr(config, name)) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
    for path, part in parts:
        for name, value in part.to_dict().items() if isinstance(part, PreTrainedConfig) else ():
            counted = re.search(r"shared", name) and isinstance(value, int) and not isinstance(value, bool) and value > 0
            if counted and value * old % new == 0:
                yield path, name, value * old // new


def _candidates(config: Any, old: int, pattern: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Fields that hold the number, those whose names are longest (most special) first."""
    parts: list[tuple[tuple[str, ...], Any]] = [((), config)]
    parts += [((name,), getattr(config, name)) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None)]
    found = []
    for path, part in parts:
        if not isinstance(part, PreTrainedConfig):
            continue
        for name, value in part.to_dict().items():
            held = re.search(pattern, name) and not re.search(r"per_tok|top_?k|shared|_k$", name)
            if held and isinstance(value, int) and not isinstance(value, bool) and value == old:
                found.append((path, name))
    return iter(sorted(found, key=lambda each: (-("moe" in each[1] or "expert" in each[1]), -len(each[1]))))


def _at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config
