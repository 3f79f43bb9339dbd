"""Stable rank: drop the experts whose matrices are closest to rank one."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "stable_rank", paper="2504.05586", card=CARD, exact=False)
class StableRank(Scored):
    """The sum of squared singular values over the largest one squared, averaged over an expert's matrices. Reads no text."""

    def score(self, layer: Layer) -> Tensor:
        return torch.tensor([_stable_rank(layer, e) for e in range(layer.facts.experts)], dtype=torch.float64)


def _stable_rank(layer: Layer, e: int) -> float:
    matrices = [tensor for tensor in layer.expert(e).values() if tensor.dim() == 2]
    return sum(float(m.double().square().sum()) / max(_largest(m), 1e-300) for m in matrices) / len(matrices)


def _largest(matrix: Tensor) -> float:
    """The largest eigenvalue of the smaller of M M^T and M^T M: the largest singular value squared."""
    matrix = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return float(torch.linalg.eigvalsh(matrix @ matrix.T)[-1])
