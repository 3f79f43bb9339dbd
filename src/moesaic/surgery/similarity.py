"""How alike the experts of a layer are: cosines [E, E] of weights, router rows, logits or mean outputs.

E experts, D model width. Weights are taken tensor by tensor and a slice of columns at a time, so that no copy of the bank
in float32 exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.layer import Layer

SLICE = 1 << 22
"""Values of all experts together that are converted at a time."""


def weight_gram(layer: Layer) -> Tensor:
    """Inner products of the flattened experts (all their tensors, biases included), float64 [E, E]."""
    bank = layer.block.bank
    E = len(bank)
    gram_EE = torch.zeros(E, E, dtype=torch.float64)
    for stack in bank.stacked():
        flat_EN = stack.detach().reshape(E, -1)
        for part_EN in flat_EN.split(max(1, SLICE // E), dim=1):
            part_EN = part_EN.float().cpu()
            gram_EE += (part_EN @ part_EN.T).double()
    return gram_EE


def cosines(gram_EE: Tensor) -> Tensor:
    """Cosines from inner products; 0 to and from what is zero."""
    size_E = gram_EE.diagonal().clamp(min=1e-300).sqrt()
    return gram_EE / (size_E[:, None] * size_E)


def _of_rows(rows_EN: Tensor) -> Tensor:
    rows_EN = rows_EN.double()
    return cosines(rows_EN @ rows_EN.T)


SIMILARITIES: dict[str, Callable[[Layer], Tensor]] = {
    "router_logits": lambda layer: layer.statistics.logit_similarity_EE,
    "router_rows": lambda layer: _of_rows(layer.rows_ED),
    "weight": lambda layer: cosines(weight_gram(layer)),
    "output": lambda layer: _of_rows(layer.statistics.mean("all_output")),
    "routed_output": lambda layer: _of_rows(layer.statistics.mean("output")),
}
"""Kind -> cosine [E, E]. "router_logits" reads tier R0, "output" A1 and "routed_output" R1."""


def similarity(layer: Layer, kind: str) -> Tensor:
    """(cosine + 1) / 2 between experts, float64 [E, E], within [0, 1]."""
    return (SIMILARITIES[kind](layer).clamp(-1, 1) + 1) / 2


def check_kind(kind: str) -> None:
    """Raises BadInput for a similarity that does not exist."""
    if kind not in SIMILARITIES:
        raise BadInput(f"similarity {kind!r}: one of {', '.join(SIMILARITIES)}")
