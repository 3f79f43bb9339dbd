"""One MoE block of a streamed model: where its experts come from, and which of them are in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import Weights, quantized, waves
from moesaic.kernels.products import hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.serving.streamed.fetch import in_place
from moesaic.serving.streamed.packed_sources import PackedSource, Sourced
from moesaic.store import Slots
from moesaic.view.block import Block
from moesaic.view.implementation import form_of
from moesaic.view.packed import as_expert


class Layer:
    """One block: where its experts come from, the slots of their size, and which of them are in memory."""

    def __init__(self, number: int, block: Block, sources: list[Sourced]) -> None:
        self.number, self.block, self.sources = number, block, sources
        self.experts, self.bytes = block.num_experts, slot_bytes(block, sources)
        self.dtype = block.experts.down_proj.dtype
        self.kind = slot_kind(block, sources)
        self.aside = not all(in_place(source, self.kind[2]) for source in sources)
        self.form = form_of(block.experts)
        self.held: dict[int, int] = {}
        self.inside: dict[int, int] = {}
        self.slots: Slots
        self.weights: Weights

    def stand_in(self) -> Weights:
        """Weights of this layer's shape without memory, for kernels to say whether they could run them."""
        gate_up, down = (torch.empty(1, *source.shape, dtype=self.dtype, device="meta") for source in self.sources)
        return Weights(gate_up, down, self.form, self.block.bank.transposed)

    def use(self, slots: Slots) -> None:
        """Begin with these slots, none of them filled."""
        self.slots, self.held, self.inside = slots, {}, {}
        if records_of(self.sources) is not None:
            return
        gate_up, down = slots.tensors
        self.weights = Weights(gate_up, down, self.form, self.block.bank.transposed)

    def matrix(self, which: int, slot: int) -> Tensor:
        """A matrix of the expert in a slot, beginning where in a cache line the resident model has it."""
        shift = 0 if self.kind[2] == torch.uint8 else self.sources[which].shift(self.inside[slot], self.dtype)
        return self.slots.matrix(which, slot, shift)

    def run(self, x_TD: Tensor, dispatch: Dispatch, parts: waves.Parts) -> Tensor:
        """y [T, D] of the experts as `parts` brings them into slots; see kernels/waves.py."""
        source = records_of(self.sources)
        if source is None:
            return waves.run(x_TD, dispatch, self.weights, parts, self.matrix)
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        spans = hit_spans(bounds_of(dispatch))
        for part in parts(spans, None) if spans else ():
            held = {
                self.inside[slot]: as_expert(source.packed, source.block, self.matrix(0, slot), self.matrix(1, slot))
                for slot, _, _ in part
            }
            quantized.add(x_TD, dispatch, held, [(self.inside[slot], start, end) for slot, start, end in part], y_TD, self.form)
        return y_TD.to(x_TD.dtype)


def records_of(sources: Sequence[Sourced]) -> PackedSource | None:
    """One of the sources, where slots hold records that are computed from as they lie."""
    first = sources[0]
    return first if isinstance(first, PackedSource) and first.block.record_bits is not None else None


def slot_kind(block: Block, sources: Sequence[Sourced]) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    """Shapes and dtype of what a slot holds."""
    if records_of(sources) is not None:
        first, second = (source.ranges(0)[0].shape for source in sources)
        return first, second, torch.uint8
    return sources[0].shape, sources[1].shape, block.experts.down_proj.dtype


def slot_bytes(block: Block, sources: Sequence[Sourced]) -> int:
    """What one expert takes of the budget."""
    if records_of(sources) is not None:
        return sum(source.ranges(0)[0].nbytes for source in sources)
    return block.expert_bytes
