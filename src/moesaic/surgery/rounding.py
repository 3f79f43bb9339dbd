"""Round experts to a grid of few levels: what every method of the family `quantize` shares.

A rounded expert is written as the weights that the grid stands for, in the checkpoint's own dtype: stock classes load it, at
the old size. `moesaic quantize --format packed` then writes codes and scales (kernels/low_bits.py), which finds the same grid
again. Router, biases and shared experts stay as they are.
Shape legend: E experts, B outputs, A inputs, G groups in a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import GRIDS, GROUP_SIZES, choose_codes, levels_of
from moesaic.surgery.layer import Change, Facts, Layer, Method
from moesaic.view.bank import ExpertWeights

WHOLE = 16
"""Stands for an expert that stays as it is."""

LADDER = (2, 4, 8, WHOLE)
"""Widths that can be packed."""

MATRICES = ("gate", "up", "down")


def round_matrix(weight_BA: Tensor, bits: int, group: int) -> Tensor:
    """The nearest point of the grid whose scales are searched for least squared error, float32 [B, A]."""
    codes_BA, scale_BG = choose_codes(weight_BA.float(), bits, group)
    step, first = GRIDS[bits]
    return (codes_BA.float() * step + first) * spread(scale_BG.float(), group, weight_BA.shape[1])


def spread(scale_BG: Tensor, group: int, columns: int) -> Tensor:
    """A scale per weight [B, A]."""
    return scale_BG.repeat_interleave(group, 1)[:, :columns]


def on_scales(weight_BA: Tensor, scale_BA: Tensor, bits: int) -> Tensor:
    """The nearest points under given scales."""
    return levels_of(weight_BA, scale_BA, bits) * scale_BA


def round_expert(expert: ExpertWeights, bits: int, group: int) -> ExpertWeights:
    """Every matrix rounded for itself; biases as they are."""
    return ExpertWeights({n: round_matrix(t, bits, group) if n in MATRICES else t for n, t in expert.items()})


def relative_error(expert: ExpertWeights, rounded: ExpertWeights) -> float:
    """Root mean square over all matrices, relative to the weights themselves."""
    off = sum(float((expert[n] - rounded[n]).double().square().sum()) for n in MATRICES if n in expert)
    return math.sqrt(off / max(sum(float(expert[n].double().square().sum()) for n in MATRICES if n in expert), 1e-300))


def stored_bytes(expert: ExpertWeights, bits: int, group: int) -> int:
    """Of an expert's matrices as codes and bf16 scales, without padding; of 16 bits, two bytes a weight."""
    total = 0
    for name in MATRICES:
        if name in expert:
            rows, columns = expert[name].shape
            total += rows * (columns * bits // 8 + (0 if bits == WHOLE else 2 * -(-columns // group)))
    return total


class Rounder(Method):
    """Base: `rounded(layer, e, bits)` says how; `bits` are given to experts by `allocate`, by default a mean width.

    A mean that is no width of its own is met by the two widths around it: the experts that the lower one hurts most (its
    relative error, measured) get the higher one, over the whole model.
    """

    def __init__(self, bits: float = 4, group: int = 64) -> None:
        if group not in GROUP_SIZES:
            raise BadInput(f"group {group}: weights of a row that share a scale, one of {', '.join(map(str, GROUP_SIZES))}")
        if not 1 <= bits <= WHOLE:
            raise BadInput(f"bits {bits}: a number of bits from 1 to {WHOLE}, the mean over all experts")
        self.bits, self.group = bits, group
        self.low, self.high = between(bits)
        self.widths: tuple[int, ...] = (self.low, self.high)
        if self.low != self.high:
            self.together = (
                f"bits {bits:g} gives {self.high} bits to those experts of the whole model that {self.low} hurt most"
            )

    on_grid = True
    """Whether all that is rounded lies on the grids of kernels/low_bits.py."""

    def look(self, layer: Layer) -> Any:
        """Relative error of each expert at the lower width, where widths differ."""
        if self.low == self.high:
            return None
        experts = (layer.expert(e) for e in range(layer.facts.experts))
        return [relative_error(each, round_expert(each, self.low, self.group)) for each in experts]

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        """Of each layer the bits of its experts, and what they were given by."""
        return list(zip(self.allocate(looks, blocks), map(self.scores, looks), strict=True))

    def scores(self, look: Any) -> Tensor | None:
        """[E], higher is worth more bits; None where all have the same."""
        return None if look is None else torch.as_tensor(look, dtype=torch.float64)

    def allocate(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[list[int]]:
        """Bits of each expert of each layer."""
        found = [[self.low] * facts.experts for facts in blocks]
        if self.low == self.high:
            return found
        order = sorted((-error, i, e) for i, errors in enumerate(looks) for e, error in enumerate(errors))
        count = math.floor((self.bits - self.low) / (self.high - self.low) * len(order) + 1e-9)
        for _, i, e in order[:count]:
            found[i][e] = self.high
        return found

    def rounded(self, layer: Layer, e: int, bits: int) -> ExpertWeights:
        return round_expert(layer.expert(e), bits, self.group)

    def change(self, layer: Layer, decision: Any) -> Change:
        given, score_E = decision
        change, errors, sizes = Change(range(layer.facts.experts), scores=score_E), [], []
        for e, bits in enumerate(given):
            own = layer.expert(e)
            sizes.append(stored_bytes(own, bits, self.group))
            if bits == WHOLE:
                errors.append(0.0)
                continue
            change.experts[e] = self.rounded(layer, e, bits)
            errors.append(relative_error(own, change.experts[e]))
        change.report = {"bits": list(given), "group": self.group, "error": errors, "packed_bytes": sizes}
        return change


def between(bits: float) -> tuple[int, int]:
    """The widths around a mean: twice the same where it is one. 1 and 3 are widths that no record holds."""
    if bits in GRIDS or bits == WHOLE:
        return int(bits), int(bits)
    ladder = (1, *LADDER) if bits < LADDER[0] else LADDER
    return max(each for each in ladder if each < bits), min(each for each in ladder if each > bits)


def second_moment(gram_AA: Tensor, count: float, damp: float = 1e-6) -> Tensor:
    """The mean of x x^T with `damp` times its mean diagonal on the diagonal, so that it can be inverted, float64."""
    mean_AA = gram_AA.double() / max(count, 1.0)
    size = float(mean_AA.diagonal().mean())
    return mean_AA + torch.eye(len(mean_AA), dtype=torch.float64) * max(damp * size, 1e-12)
