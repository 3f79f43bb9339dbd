"""What rounding one expert does to its output: on inputs like those it saw, or on recorded ones.

S rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.surgery.factored import moment_of
from moesaic.surgery.layer import Layer
from moesaic.surgery.seen import seen
from moesaic.view.bank import ExpertWeights

ROWS = 128
"""Drawn inputs."""


def output_error(layer: Layer, e: int, made: ExpertWeights, how: str = "moments") -> float:
    """The root of the mean squared error of the output, all other experts untouched.

    "moments": on normal inputs of the second moment that expert e saw (R2), the same draws for every expert. "features": on
    recorded tokens that chose e (C), each times its gate; 0 where none did.
    """
    if how == "features":
        x_SD, weight_S = seen(layer).of(e)
    else:
        root_DD = torch.linalg.cholesky(moment_of(layer, e, "first")).float()
        draws_SD = torch.randn(ROWS, len(root_DD), generator=torch.Generator().manual_seed(0))
        x_SD, weight_S = draws_SD @ root_DD.T, torch.ones(ROWS)
    if not len(x_SD):
        return 0.0
    off_SD = run_with(layer, e, made, x_SD) - layer.run(e, x_SD)[1].float()
    return float((off_SD * weight_S[:, None]).square().sum(1).mean().sqrt())


@torch.no_grad()
def run_with(layer: Layer, e: int, made: ExpertWeights, x_SD: Tensor) -> Tensor:
    """Expert e with other weights, as the model computes it, float32 [S, D]."""
    bank: Any = layer.block.bank
    own = {name: tensor.clone() for name, tensor in bank.peek(e).items()}
    try:
        bank[e] = made.map(lambda tensor: tensor.to(own["down"].dtype))
        return layer.run(e, x_SD)[1].float()
    finally:
        bank[e] = own
