"""Random: drop experts by lot, the baseline of every other pruner."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "random", card=CARD, exact=False)
class Random(Scored):
    """Uniform numbers, drawn for each layer from `seed` and the block's number.

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (as many in every layer) or "global" (one ranking of the whole model).
        seed: of the lot.
    """

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform", seed: int = 0) -> None:
        super().__init__(keep, scope)
        self.seed = seed

    def score(self, layer: Layer) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.facts.number)
        return torch.rand(layer.facts.experts, generator=generator, dtype=torch.float64)
