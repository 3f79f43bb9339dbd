"""Gradient norm: drop the experts on which the loss depends least."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "gradient_norm", paper="2504.05586", card=CARD, exact=False, needs={"B"})
class GradientNorm(Scored):
    """The root of the mean over sequences of |dL/dW_e|^2, over all of an expert's tensors (tier B's squared gradients)."""

    def score(self, layer: Layer) -> Tensor:
        statistics, E = layer.statistics, layer.facts.experts
        total_E = torch.zeros(E, dtype=torch.float64)
        for name, _ in layer.block.experts.named_parameters(recurse=False):
            squares = statistics[f"fisher.{name}_sum"]
            if squares.shape[0] == E:
                total_E += squares.reshape(E, -1).sum(1, dtype=torch.float64)
        return (total_E / statistics["sequence_count"].clamp(min=1)).sqrt()
