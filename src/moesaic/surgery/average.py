"""Average experts: weighted by use, or through a factor that they share. Also what becomes of the router's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moesaic.view.bank import ExpertWeights


def shares(usage_G: Tensor) -> Tensor:
    """Weights of a group's members that sum to one; equal where none was used."""
    usage_G = usage_G.double()
    total = usage_G.sum()
    return usage_G / total if total > 0 else torch.full_like(usage_G, 1 / len(usage_G))


def mean(experts: Sequence[Mapping[str, Tensor]], share_G: Tensor) -> ExpertWeights:
    """The weighted mean of each tensor, float32."""
    total: dict[str, Tensor] = {}
    for expert, share in zip(experts, share_G.tolist(), strict=True):
        for name, tensor in expert.items():
            total[name] = total[name].add_(tensor.float(), alpha=share) if name in total else tensor.float() * share
    return ExpertWeights(total)


def shared_factor(matrices: Sequence[Tensor], share_G: Tensor, rank: int | None = None) -> Tensor:
    """[W_1 ... W_m] = U S [V_1^T ... V_m^T], cut at `rank`; U S times the weighted mean of the V_e^T.

    Uncut it is the weighted mean of the matrices themselves: U S (sum of share V_e^T) = sum of share W_e.
    """
    side = torch.cat([matrix.double() for matrix in matrices], dim=1)
    left, sizes, right = torch.linalg.svd(side, full_matrices=False)
    cut = len(sizes) if rank is None else min(rank, len(sizes))
    parts = right[:cut].split([matrix.shape[1] for matrix in matrices], dim=1)
    middle = sum(part * share for part, share in zip(parts, share_G.tolist(), strict=True))
    return ((left[:, :cut] * sizes[:cut]) @ middle).float()


def mix(groups: Sequence[Sequence[int]], weight_E: Tensor) -> Tensor:
    """[R, E]: each group's rows as their weighted mean."""
    mix_RE = torch.zeros(len(groups), len(weight_E), dtype=torch.float32)
    for row, group in enumerate(groups):
        mix_RE[row, list(group)] = shares(weight_E[list(group)]).float()
    return mix_RE
