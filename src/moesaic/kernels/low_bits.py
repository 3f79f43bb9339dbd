"""Weights in 8, 4 or 2 bits as plain bytes: the same on every machine, in memory and in a file.

A matrix [B, A] is cut along A into groups of `group_size` inputs (the last group of a row is shorter where A is no
multiple). A group has one scale and a weight is scale * level, where the level of code c is c - 128 (8 bits, so -128 to
127), c - 8 (4 bits, -8 to 7) or 2c - 3 (2 bits: -3, -1, 1, 3). The scale may be negative: levels reach one further below
zero than above, and the sign turns the group's largest weight that way. A record is the codes, [B, A * bits / 8] bytes
whose lowest bits hold the leftmost weight, then the scales, bf16 [B, groups], each beginning at a multiple of 64 bytes.

No zero point is stored: at equal bytes it gains nothing. Relative RMS error on the bundled model's experts, each scale
searched: 4.5 bits per weight 0.079 without (groups of 32) and 0.079 with (64); 4.25 bits 0.087 (64) and 0.089 (128);
2.5 bits 0.320 and 0.315. Scales are searched, not taken from the largest weight: of some fractions of it the one of least
squared error, then the scale that fits those codes best. That takes 4 bits from 0.092 to 0.086 and 2 bits from 0.39 to 0.33
(groups of 64); in 8 bits it changes nothing. The scale is rounded to bf16 before codes are chosen for it. Levels and grouping
follow what is common practice (llama.cpp, GPTQ); cards "EdgeMoE" and "Fate" of serving-and-scale.md have experts in 4 and 2.

Shape legend: B outputs, A inputs, G groups in a row, g inputs in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput

ALIGNMENT = 64
"""Bytes of which every part of a record begins at a multiple: a cache line."""

LEVELS = {8: (1, -128), 4: (1, -8), 2: (2, -3)}
"""Bits -> (step, first): the level of code c is step * c + first."""

GRIDS = {**LEVELS, 3: (1, -4), 1: (2, -1)}
"""The same, and grids that weights can be rounded to, but that no record holds."""

GROUP_SIZES = (32, 64, 128)

FRACTIONS = {
    8: (1.0,),
    4: (1.0, 0.75, 0.84, 0.92, 1.06),
    3: (1.0, 0.65, 0.75, 0.84, 0.92, 1.08),
    2: (1.0, 0.5, 0.58, 0.66, 0.74, 0.82, 0.9),
    1: (1.0,),
}
"""Bits -> the scales tried, as shares of the one that just reaches the group's largest weight. Ties go to the first."""

ON_GRID = 0.0025
"""Relative error below which a group lies on a grid already, written in bf16 (whose own error is 0.002 at most)."""

ROWS_AT_ONCE = 1 << 16
"""Weights searched at a time: their temporaries stay in a core's second-level cache."""


@dataclass(frozen=True)
class Packing:
    """How a matrix is stored: `bits` per weight (8, 4, 2) and `group_size` inputs that share a scale (32, 64, 128)."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in LEVELS:
            raise BadInput(f"{self.bits} bits per weight: one of {', '.join(map(str, LEVELS))}")
        if self.group_size not in GROUP_SIZES:
            raise BadInput(f"groups of {self.group_size} inputs: one of {', '.join(map(str, GROUP_SIZES))}")

    def __str__(self) -> str:
        return f"int{self.bits} in groups of {self.group_size}"


class Part(NamedTuple):
    """One tensor of a record, stored contiguously."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@cache
def parts(packing: Packing, shape: tuple[int, int]) -> tuple[Part, ...]:
    """The parts of a [B, A] matrix's record, in their order. Raises BadInput for a row that is no whole number of bytes."""
    rows, columns = shape
    if rows < 1 or columns < 1 or columns * packing.bits % 8:
        raise BadInput(f"a matrix of {rows} x {columns} has no rows of whole bytes in {packing.bits} bits")
    groups = -(-columns // packing.group_size)
    return (
        Part("codes", torch.uint8, (rows, columns * packing.bits // 8)),
        Part("scale", torch.bfloat16, (rows, groups)),
    )


@cache
def part_offsets(packing: Packing, shape: tuple[int, int]) -> tuple[int, ...]:
    """The byte at which each part of a record begins, and the record's size."""
    offsets = [0]
    for part in parts(packing, shape):
        offsets.append(-(-(offsets[-1] + part.nbytes) // ALIGNMENT) * ALIGNMENT)
    return tuple(offsets)


def record_bytes(packing: Packing, shape: tuple[int, int]) -> int:
    """Bytes of a [B, A] matrix's record: a multiple of 64."""
    return part_offsets(packing, shape)[-1]


def open_record(record: Tensor, packing: Packing, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The parts of a record as views. Raises BadInput for a record of another size or dtype."""
    size = record_bytes(packing, shape)
    if record.dtype != torch.uint8 or tuple(record.shape) != (size,) or not record.is_contiguous():
        raise BadInput(
            f"the record of a {shape[0]} x {shape[1]} matrix, {packing}, is {size} contiguous bytes (uint8); "
            f"got {record.dtype} {list(record.shape)}"
        )
    held = zip(parts(packing, shape), part_offsets(packing, shape), strict=False)  # the last offset is the size
    return tuple(record[at : at + part.nbytes].view(part.dtype).view(part.shape) for part, at in held)


def quantize_matrix(weight_BA: Tensor, packing: Packing) -> Tensor:
    """The record of a matrix, uint8 [record_bytes], on the CPU.

    Raises BadInput for a matrix of another rank, on the meta device, with rows that are no whole number of bytes, or with
    weights that are not finite.
    """
    if weight_BA.dim() != 2 or weight_BA.is_meta or not weight_BA.dtype.is_floating_point:
        raise BadInput(
            f"quantising takes a matrix of floats: got {weight_BA.dtype} {list(weight_BA.shape)} on {weight_BA.device}"
        )
    rows, columns = weight_BA.shape
    record = torch.zeros(record_bytes(packing, (rows, columns)), dtype=torch.uint8)
    codes, scale = open_record(record, packing, (rows, columns))
    step = max(1, ROWS_AT_ONCE // columns)
    with torch.no_grad():
        for low in range(0, rows, step):
            wide_BA = weight_BA[low : low + step].to("cpu", torch.float32)
            if not wide_BA.isfinite().all():
                raise BadInput(
                    f"rows {low} to {low + len(wide_BA) - 1} hold weights that are not finite: nothing to round them to"
                )
            codes_BA, scale_BG = choose_codes(wide_BA, packing.bits, packing.group_size)
            codes[low : low + step], scale[low : low + step] = pack_codes(codes_BA, packing.bits), scale_BG
    return record


def dequantize_matrix(record: Tensor, packing: Packing, shape: tuple[int, int]) -> Tensor:
    """The weights that a record stands for, fp32 [B, A]."""
    codes, scale_BG = open_record(record, packing, shape)
    step, first = LEVELS[packing.bits]
    levels_BA = unpack_codes(codes, packing.bits).float().mul_(step).add_(first)
    if shape[1] % packing.group_size == 0:
        return (levels_BA.unflatten(1, (-1, packing.group_size)) * scale_BG.float().unsqueeze(2)).flatten(1)
    return levels_BA.mul_(scale_BG.float().repeat_interleave(packing.group_size, 1)[:, : shape[1]])


def pack_codes(codes_BA: Tensor, bits: int) -> Tensor:
    """Codes [B, A], one a byte, as bytes that hold 8 / bits of them."""
    if bits == 8:
        return codes_BA
    planes = codes_BA.unflatten(1, (-1, 8 // bits)) << torch.arange(0, 8, bits, dtype=torch.uint8)
    return planes.sum(2, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Codes [B, A], one a byte."""
    if bits == 8:
        return packed
    return ((packed.unsqueeze(2) >> torch.arange(0, 8, bits, dtype=torch.uint8)) & (2**bits - 1)).flatten(1)


def choose_codes(wide_BA: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [B, A], one a byte, and scales bf16 [B, G] of an fp32 matrix, on any of the GRIDS."""
    rows, columns = wide_BA.shape
    whole = columns - columns % group_size
    made = [
        _quantize_groups(piece_BA.reshape(-1, size), bits)
        for piece_BA, size in ((wide_BA[:, :whole], group_size), (wide_BA[:, whole:], columns - whole))
        if piece_BA.shape[1]
    ]
    codes_BA, scale_BG = (torch.cat([piece.view(rows, -1) for piece in pieces], 1) for pieces in zip(*made, strict=True))
    return codes_BA, scale_BG


def _quantize_groups(weight_Ng: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N, g], scale bf16 [N, 1]) of least squared error among the scales tried."""
    step, first = GRIDS[bits]
    reach = float(step * (2**bits - 1) + first if bits <= 2 else first)
    peak_N1 = weight_Ng.gather(1, weight_Ng.abs().argmax(1, keepdim=True))
    scale_N1 = peak_N1 / reach
    best_N1, least_N1 = _searched(weight_Ng, [scale_N1 * fraction for fraction in FRACTIONS[bits]], bits)
    best_N1 = _on_grid(weight_Ng, peak_N1, best_N1, least_N1, bits, int(abs(reach)))
    codes_Ng = levels_of(weight_Ng, best_N1, bits).sub_(first).div_(step)
    return codes_Ng.to(torch.uint8), best_N1.bfloat16()


def _searched(weight_Ng: Tensor, scales: list[Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """The scale [N, 1] of least squared error among these and the ones that best fit their codes, and its error."""
    best_N1, least_N1 = None, None
    for scale_N1 in scales:
        tried_N1 = _stored(scale_N1)
        for _ in range(2):
            levels_Ng = levels_of(weight_Ng, tried_N1, bits)
            error_N1 = torch.addcmul(weight_Ng, levels_Ng, tried_N1, value=-1).square_().sum(1, keepdim=True)
            if best_N1 is None or least_N1 is None:
                best_N1, least_N1 = tried_N1, error_N1
            else:
                best_N1 = torch.where(error_N1 < least_N1, tried_N1, best_N1)
                least_N1 = torch.minimum(error_N1, least_N1)
            tried_N1 = _stored(  # the scale of least error for these levels
                (weight_Ng * levels_Ng).sum(1, keepdim=True) / levels_Ng.square().sum(1, keepdim=True).clamp_(min=1)
            )
    assert best_N1 is not None and least_N1 is not None
    return best_N1, least_N1


def _on_grid(weight_Ng: Tensor, peak_N1: Tensor, best_N1: Tensor, least_N1: Tensor, bits: int, reach: int) -> Tensor:
    """The scales of a matrix that was rounded before, found again: its groups then come back as they are.

    Most groups of such a matrix have their largest weight at the furthest level, where the search meets their scale. If a
    quarter do, the others are tried with the largest weight at each of the next levels.
    """
    size_N1 = weight_Ng.square().sum(1, keepdim=True)
    settled_N1 = least_N1 <= ON_GRID**2 * size_N1
    if bits <= 2 or bool(settled_N1.all()) or float((settled_N1 & (size_N1 > 0)).float().mean()) < 0.25:
        return best_N1
    rows_M = torch.nonzero(~settled_N1[:, 0]).flatten()
    tried = [peak_N1[rows_M] / level for level in range(max(1, reach // 2), reach)]
    found_M1, error_M1 = _searched(weight_Ng[rows_M], tried, bits)
    better_M1 = error_M1 <= ON_GRID**2 * size_N1[rows_M]
    best_N1 = best_N1.clone()
    best_N1[rows_M] = torch.where(better_M1, found_M1, best_N1[rows_M])
    return best_N1


def _stored(scale_N1: Tensor) -> Tensor:
    return scale_N1.bfloat16().float()


def levels_of(weight_Ng: Tensor, scale_N1: Tensor, bits: int) -> Tensor:
    """The nearest levels under a scale; a scale of zero (a group of zeros) takes any."""
    step, first = GRIDS[bits]
    return (
        ((weight_Ng / torch.where(scale_N1 == 0, 1.0, scale_N1)).sub_(first).div_(step))
        .round_()
        .clamp_(0, 2**bits - 1)
        .mul_(step)
        .add_(first)
    )
