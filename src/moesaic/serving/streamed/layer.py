"""One MoE block of a streamed model: where its experts come from, and which of them are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import Weights, quantized, waves
from moesaic.kernels.products import hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.store import Slots
from moesaic.view.block import Block
from moesaic.view.implementation import form_of
from moesaic.view.packed import as_expert
from moesaic.view.skeleton.fetch import in_place
from moesaic.view.skeleton.packed_sources import PackedSource, Sourced

Kind = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shapes and dtype of the two matrices that a slot holds."""


class Layer:
    """One block: where its experts come from, the slots of their sizes, and which of them are in memory.

    Attributes:
        kinds, kind_E: the kinds of slots its experts need, and which of them each expert needs: several where records differ
            in width.
        bytes_E: what each expert takes of the budget.
        held: slot of each expert in memory; `inside`: the expert in each slot. A slot's number says its kind, too.
    """

    def __init__(self, number: int, block: Block, sources: list[Sourced]) -> None:
        self.number, self.block, self.sources = number, block, sources
        self.experts = block.num_experts
        self.bytes_E = slot_bytes(block, sources)
        self.dtype = block.experts.down_proj.dtype
        kinds = slot_kinds(block, sources)
        self.kinds = list(dict.fromkeys(kinds))
        self.kind_E = [self.kinds.index(kind) for kind in kinds]
        self.aside = not all(in_place(source, e, kind[2]) for e, kind in enumerate(kinds) for source in sources)
        self.form = form_of(block.experts)
        self.held: dict[int, int] = {}
        self.inside: dict[int, int] = {}
        self.slots: list[Slots]
        self.weights: Weights

    def stand_in(self) -> Weights:
        """Weights of this layer's shape without memory, for kernels to say whether they could run them."""
        gate_up, down = (torch.empty(1, *source.shape, dtype=self.dtype, device="meta") for source in self.sources)
        return Weights(gate_up, down, self.form, self.block.bank.transposed)

    def use(self, slots: list[Slots]) -> None:
        """Begin with these slots, one set for each of `kinds`, none of them filled."""
        self.slots, self.held, self.inside = slots, {}, {}
        if records_of(self.sources) is not None:
            return
        gate_up, down = slots[0].tensors
        self.weights = Weights(gate_up, down, self.form, self.block.bank.transposed)

    def slot(self, e: int, index: int) -> int:
        """The number of slot `index` among those of expert e's kind; the index itself where there is one kind."""
        return index * len(self.kinds) + self.kind_E[e]

    def place(self, slot: int) -> tuple[Slots, int]:
        """Where a slot lies: its set, and its index there."""
        index, kind = divmod(slot, len(self.kinds))
        return self.slots[kind], index

    def take(self, e: int) -> int:
        """A free slot for expert e. Raises IndexError when none is left."""
        self.held[e] = slot = self.slot(e, self.slots[self.kind_E[e]].take())
        return slot

    def give(self, e: int) -> None:
        """The slot of expert e is free again."""
        slots, index = self.place(self.held.pop(e))
        slots.give(index)

    def matrix(self, which: int, slot: int) -> Tensor:
        """A matrix of the expert in a slot, beginning where in a cache line the resident model has it."""
        slots, index = self.place(slot)
        shift = 0 if slots.dtype == torch.uint8 else self.sources[which].shift(self.inside[slot], self.dtype)
        return slots.matrix(which, index, shift)

    def run(self, x_TD: Tensor, dispatch: Dispatch, parts: waves.Parts) -> Tensor:
        """y [T, D] of the experts as `parts` brings them into slots; see kernels/waves.py."""
        source = records_of(self.sources)
        if source is None:
            return waves.run(x_TD, dispatch, self.weights, parts, self.matrix)
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        spans = hit_spans(bounds_of(dispatch))
        for part in parts(spans, None) if spans else ():
            here = [(self.inside[slot], slot) for slot, _, _ in part]
            held = {
                e: as_expert(source.packed, source.block, e, self.matrix(0, slot), self.matrix(1, slot)) for e, slot in here
            }
            quantized.add(x_TD, dispatch, held, [(self.inside[slot], start, end) for slot, start, end in part], y_TD, self.form)
        return y_TD.to(x_TD.dtype)


def records_of(sources: Sequence[Sourced]) -> PackedSource | None:
    """One of the sources, where slots hold records that are computed from as they lie."""
    first = sources[0]
    return first if isinstance(first, PackedSource) and first.block.as_records else None


def slot_kinds(block: Block, sources: Sequence[Sourced]) -> list[Kind]:
    """The kind of slot that each expert needs."""
    first, second = sources
    if records_of(sources) is not None:
        return [(first.ranges(e)[0].shape, second.ranges(e)[0].shape, torch.uint8) for e in range(block.num_experts)]
    return [(first.shape, second.shape, block.experts.down_proj.dtype)] * block.num_experts


def slot_bytes(block: Block, sources: Sequence[Sourced]) -> list[int]:
    """What each expert takes of the budget."""
    if records_of(sources) is not None:
        return [sum(source.ranges(e)[0].nbytes for source in sources) for e in range(block.num_experts)]
    return [block.expert_bytes] * block.num_experts
