"""One MoE block of a streamed model: where its experts come from, and which of them are in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels import Weights
from moesaic.serving.streamed.fetch import in_place
from moesaic.serving.streamed.packed_sources import Sourced
from moesaic.store import Slots
from moesaic.view.block import Block
from moesaic.view.implementation import form_of


class Layer:
    """One block: where its experts come from, the slots of their size, and which of them are in memory."""

    def __init__(self, number: int, block: Block, sources: list[Sourced]) -> None:
        self.number, self.block, self.sources = number, block, sources
        self.experts, self.bytes = block.num_experts, block.expert_bytes
        self.dtype = block.experts.down_proj.dtype
        self.kind = (sources[0].shape, sources[1].shape, self.dtype)
        self.aside = not all(in_place(source, self.dtype) for source in sources)
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
        gate_up, down = slots.tensors
        self.weights = Weights(gate_up, down, self.form, self.block.bank.transposed)

    def matrix(self, which: int, slot: int) -> Tensor:
        """A matrix of the expert in a slot, beginning where in a cache line the resident model has it."""
        return self.slots.matrix(which, slot, self.sources[which].shift(self.inside[slot], self.dtype))
