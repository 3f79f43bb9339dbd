"""A checkpoint open for surgery: its model without memory, and one block's weights at a time put in place.

The skeleton's blocks (view/block.py) are those of the resident model, so methods read experts and run them as usual; between
`block(i)` and its end the tensors of block i are real, all others stay on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.blocks import plain
from moesaic.models.reshaped.classes import Reshaped, reshaped_config
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.layer import Facts
from moesaic.surgery.shapes import facts_of
from moesaic.view import View
from moesaic.view.block import Block
from moesaic.view.discover import expert_parameters
from moesaic.view.resize import Resized, build, resize
from moesaic.view.skeleton import load_skeleton
from moesaic.view.skeleton.fetch import fetch
from moesaic.view.skeleton.sources import Other, Source


class Checkpoint:
    """`model` is without memory; `sources[i]` says where both matrices of block i's experts lie, `others` the rest."""

    def __init__(self, path: str | Path, reader: Reader, **how: Any) -> None:
        """`how`: see `moesaic.load`. Raises BadInput for what is no MoE checkpoint of plain or fp8 safetensors."""
        self.reader = reader
        skeleton = load_skeleton(path, reader, bare=True, **how)
        self.model: Any = skeleton.loaded.model
        self.tokenizer = skeleton.loaded.tokenizer
        self.table: Table = skeleton.table
        self.folder = self.table.files[0].parent
        self.others: dict[str, Other] = skeleton.others
        self.view = View(self.model)
        self.facts: list[Facts] = facts_of(self.view)
        names = {place: name for name, place in expert_parameters(self.model).items()}
        self.matrices = [(names[i, 0], names[i, 1]) for i in range(len(self.view))]
        self.sources: list[tuple[Source, Source]] = []
        for first, second in self.matrices:
            pair = skeleton.sources[first], skeleton.sources[second]
            if not isinstance(pair[0], Source) or not isinstance(pair[1], Source):
                raise BadInput(f"{self.folder} is a packed folder: operate on the checkpoint that it was made of")
            if first != pair[0].name:
                raise BadInput(f"{first} shares its weights with {pair[0].name}: surgery changes a block without others")
            self.sources.append((pair[0], pair[1]))
        self.own = all_tensors(self.model)
        self.of_block = [self._names(block) for block in self.view]

    def _names(self, block: Block) -> list[str]:
        """Names of a block's tensors but for the matrices of its experts: the router's, biases, and the block's own."""
        held = {id(tensor) for module in (block.router, block.experts) if module for tensor in _tensors(module, True)}
        held |= {id(tensor) for tensor in _tensors(block.parent, False)}
        matrices = set(self.matrices[list(self.view).index(block)])
        return [name for name, tensor in self.own.items() if id(tensor) in held and name not in matrices]

    @property
    def reshaped(self) -> bool:
        """Whether its blocks differ or share experts: then only a class of ours holds it, and its tensors have our names."""
        return isinstance(self.model, Reshaped)

    @cached_property
    def alike(self) -> Any:
        """A model of the architecture's own class, all of whose blocks are of one size, without memory."""
        return plain(self.model) if self.reshaped else self.model

    def sized(self, experts: int, inner: int | None = None) -> Resized:
        """The same model with so many experts in every block, and so wide, without memory. Raises BadInput."""
        return resize(self.alike, experts=experts, inner=inner)

    @cached_property
    def grown(self) -> dict[str, torch.Size]:
        """Shapes of all tensors in the same model with twice the experts and rows."""
        if self.reshaped:
            blocks = {f.name: {"experts": 2 * f.experts, "rows": 2 * f.rows, "map": None} for f in self.facts}
            made = build(type(self.model), reshaped_config(self.alike.config, blocks))
        else:
            made = self.sized(2 * self.facts[0].experts).model
        return {name: tensor.shape for name, tensor in all_tensors(made).items()}

    @cached_property
    def per_expert(self) -> set[str]:
        """Names of the tensors, of any block, with a row per expert: those that grow with the number of experts."""
        return {name for name, tensor in self.own.items() if self.grown.get(name, tensor.shape) != tensor.shape}

    def bank(self, i: int, experts: list[int] | None = None) -> list[Tensor]:
        """Both stacked matrices of block i as the model has them, with these experts in this order; read from disk."""
        shapes = [source.shape for source in self.sources[i]]
        chosen = list(range(self.facts[i].experts)) if experts is None else experts
        made = [
            torch.empty(len(chosen), *shape, dtype=self.own[name].dtype)
            for shape, name in zip(shapes, self.matrices[i], strict=True)
        ]
        tickets = [
            fetch(self.reader, e, [(source, stack[at]) for source, stack in zip(self.sources[i], made, strict=True)])
            for at, e in enumerate(chosen)
        ]
        for ticket in tickets:
            ticket.wait()
        return made

    def rest(self, i: int) -> dict[str, Tensor]:
        """The other tensors of block i, in the model's dtypes."""
        return self.read(self.of_block[i])

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Parameters that are of no expert, by name; those that the checkpoint does not hold (tied, made) are left out."""
        found: dict[str, Tensor] = {}
        for name in names:
            if name in self.others and name not in found:
                found |= self.others[name].read(self.model, self.reader)
        return {name: found[name].to(self.own[name].dtype) for name in names if name in found}

    @contextmanager
    def lazily(self, i: int) -> Iterator[Block]:
        """The same, with the experts' matrices read when the module that holds them is first asked for one."""
        experts: Any = self.view[i].experts
        names = self.matrices[i]
        with put(self.model, self.rest(i)):
            held = {name.rpartition(".")[2]: experts._parameters.pop(name.rpartition(".")[2]) for name in names}
            own, checkpoint = type(experts), self

            def ask(module: Any, name: str) -> Any:
                if name not in held or name in module._parameters:
                    return own.__getattr__(module, name)
                for full, tensor in zip(names, checkpoint.bank(i), strict=True):
                    module._parameters[full.rpartition(".")[2]] = nn.Parameter(tensor, requires_grad=False)
                module.__class__ = own
                return module._parameters[name]

            experts.__class__ = type(own.__name__, (own,), {"__getattr__": ask, "__module__": own.__module__})
            try:
                yield self.view[i]
            finally:
                experts.__class__ = own
                experts._parameters.update(held)

    def name_of(self, parameter: Tensor) -> str:
        """The name of one of the block's tensors that are in place now."""
        return next(name for name, tensor in all_tensors(self.model).items() if tensor is parameter)

    @contextmanager
    def block(self, i: int) -> Iterator[Block]:
        """Block i with its weights in memory."""
        tensors = dict(zip(self.matrices[i], self.bank(i), strict=True)) | self.rest(i)
        with put(self.model, tensors):
            yield self.view[i]


@contextmanager
def put(model: Any, tensors: dict[str, Tensor]) -> Iterator[None]:
    """Parameters and buffers of a model, by name, in place of its own until the block ends."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = module._parameters if leaf in module._parameters else module._buffers
        before.append((held, leaf, held[leaf]))
        held[leaf] = nn.Parameter(tensor, requires_grad=False) if held is module._parameters else tensor
    try:
        yield
    finally:
        for held, leaf, tensor in before:
            held[leaf] = tensor


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _tensors(module: nn.Module, recurse: bool) -> list[Tensor]:
    return [*module.parameters(recurse), *module.buffers(recurse)]
