"""What a model's rounding is: bits, groups and bytes, so that whoever runs it can say that it is not the original."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.store.packed import QUANTISED, read_packed
from moesaic.view.quantize import Quantized, Recipe


@dataclass(frozen=True)
class Rounding:
    """Experts of which some are rounded: in a packed folder, or in memory when the model was loaded.

    Attributes:
        experts: how many have how many bits; 16 or 32: as they were.
        group_size: weights that share a scale.
        expert_bytes, original_bytes: of all experts, as stored without padding, and in the dtype that they were rounded from.
        bits_per_weight: in the mean over all weights of experts, scales included.
        linear: bits of the linear layers, where they are rounded too.
    """

    experts: dict[int, int]
    group_size: int
    expert_bytes: int
    original_bytes: int
    bits_per_weight: float
    linear: int | None = None

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "experts_by_bits": {str(bits): count for bits, count in self.experts.items()},
            "group_size": self.group_size,
            "bits_per_weight": self.bits_per_weight,
            "expert_bytes": self.expert_bytes,
            "original_expert_bytes": self.original_bytes,
            **({} if self.linear is None else {"linear_bits": self.linear}),
        }

    def __str__(self) -> str:
        widths = " and ".join(str(bits) for bits in self.experts)
        said = f"experts rounded to {widths} bits in groups of {self.group_size}, {self.bits_per_weight:.2f} bits per weight"
        return said if self.linear is None else f"{said}; linear layers to {self.linear}"


def rounding_in_memory(made: Quantized, recipe: Recipe) -> Rounding:
    """What `quantize_model` did."""
    widths = Counter(bits for layer in made.bits for bits in layer)
    weights = sum(math.prod(e.gate_up_shape) + math.prod(e.down_shape) for bank in made.banks for e in bank.experts)
    per_weight = 8 * made.nbytes / weights
    return Rounding(dict(sorted(widths.items())), recipe.group_size, made.nbytes, made.stored_bytes, per_weight, recipe.linear)


def rounding_of(folder: Any) -> Rounding | None:
    """None for a folder that is not packed, or packed without loss. Raises BadInput for a broken packing."""
    if folder is None or not Path(folder).is_dir():
        return None
    packed = read_packed(folder)
    if packed is None:
        return None
    experts: Counter[int] = Counter()
    stored = original = weights = 0
    for block, e in packed.contents.records():
        bits, count = block.bits_E[e], sum(math.prod(shape) for shape in block.shapes)
        experts[bits] += 1
        stored += sum(block.sizes[bits])
        original += count * block.dtype.itemsize
        weights += count
    if not any(bits in QUANTISED for bits in experts):
        return None
    return Rounding(dict(sorted(experts.items())), packed.contents.group_size, stored, original, 8 * stored / weights)
