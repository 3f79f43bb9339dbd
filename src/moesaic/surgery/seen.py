"""A layer's recorded inputs and which experts they chose: tier C, routed again.

Nothing is written into the model and no output of it changes: experts may run on tokens that did not choose them.
T tokens, S of them that chose one expert, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.surgery.layer import Layer
from moesaic.surgery.reconstruct import Reconstruction


class Seen(NamedTuple):
    """Inputs, and the routing's ids [T, K] (-1: none) and weights [T, K]."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    def of(self, e: int) -> tuple[Tensor, Tensor]:
        """Inputs of the tokens that chose expert e [S, D], and their weights for it [S]."""
        token_S, slot_S = torch.nonzero(self.ids_TK == e, as_tuple=True)
        return self.x_TD[token_S], self.weights_TK[token_S, slot_S]


def seen(layer: Layer, tokens: int = 1024) -> Seen:
    """Of at most so many tokens, evenly thinned out. Raises BadInput for no features, or a router that reads other inputs."""
    held = getattr(layer, "_seen", None)
    if held is None or held[0] != tokens:
        output = Reconstruction(layer, tokens)
        routing = output._routing([])
        assert routing.experts_TK is not None and routing.weights_TK is not None
        held = tokens, Seen(output._x_TD, routing.experts_TK, routing.weights_TK.float())
        layer._seen = held  # type: ignore[attr-defined]
    return held[1]
