"""Which rows each program of a grouped product takes, decided on the device: no synchronisation with the host.

Every expert's pairs are cut into tiles of `block_m` rows. There are at most S / block_m + E of them; programs beyond
the real number find expert E and leave.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Tile n belongs to expert expert_N[n] and begins at pair row_N[n]."""

    expert_N: Tensor
    row_N: Tensor
    block_m: int

    @classmethod
    def of(cls, offsets_E1: Tensor, pairs: int, block_m: int) -> Tiles:
        experts = offsets_E1.numel() - 1
        tiles_E = (offsets_E1.diff() + block_m - 1) // block_m
        ends_E = tiles_E.cumsum(0)
        number_N = torch.arange(-(-pairs // block_m) + min(experts, pairs), device=offsets_E1.device)
        expert_N = torch.searchsorted(ends_E, number_N, right=True)
        inside_N = expert_N.clamp(max=experts - 1)
        row_N = offsets_E1[inside_N] + (number_N - (ends_E - tiles_E)[inside_N]) * block_m
        return cls(expert_N.int(), row_N, block_m)


def block_rows(pairs: int, experts: int) -> int:
    """Rows of a tile: about a mean expert's share, between what a tensor core needs and what a program can hold."""
    mean = pairs / max(1, experts)
    return 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean <= 96 else 128
