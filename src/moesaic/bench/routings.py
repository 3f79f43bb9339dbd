"""Routings to benchmark under: uniform, Zipf, and the loads recorded from a real model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

COUNTS = "olmoe-counts.npz"


def real_shares(folder: Path, experts: int) -> Tensor | None:
    """Share of pairs per expert in OLMoE's first recorded layer over all its domains, [E], repeated or cut to E; None
    where the data folder is missing."""
    import numpy

    file = folder / COUNTS
    if not file.is_file():
        return None
    with numpy.load(file) as data:
        counts = sum(
            torch.from_numpy(data[name][0]).double() / data[name][0].sum() for name in data if name.endswith(".counts")
        )
    shares_E = torch.as_tensor(counts).repeat(-(-experts // len(counts)))[:experts]
    return shares_E / shares_E.sum()


def shares(kind: str, experts: int, folder: Path) -> Tensor | None:
    """Probability of each expert under `uniform`, `zipf` or `real`."""
    if kind == "uniform":
        return torch.full((experts,), 1 / experts, dtype=torch.float64)
    if kind == "zipf":
        weight_E = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
        return weight_E[torch.randperm(experts)] / weight_E.sum()
    return real_shares(folder, experts)


def draw(shares_E: Tensor, tokens: int, slots: int) -> tuple[Tensor, Tensor]:
    """K different experts per token, drawn one after the other by their shares (Gumbel top-k), and weights summing to 1."""
    noise_TE = -torch.log(-torch.log(torch.rand(tokens, shares_E.numel(), dtype=torch.float64).clamp(1e-12, 1 - 1e-12)))
    experts_TK = (shares_E.log() + noise_TE).topk(slots, dim=1).indices
    return experts_TK, torch.rand(tokens, slots).softmax(1)
