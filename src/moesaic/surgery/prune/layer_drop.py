"""Layer drop: silence the routed experts of the layers that change their input least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.layer import Change, Facts, Layer, Method

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "layer_drop", paper="2406.02500", card=CARD, exact=False, needs={"C"})
class LayerDrop(Method):
    """Layers go by the mean cosine between their input and (input + output), the highest first.

    Input and output are those of the routed experts (tier C): after the layer's own normalisation, while the released code
    compares the residual stream before and after, shared expert included, which no statistic keeps. What is left of a
    dropped layer is what its router needs (`Facts.least` experts) with zero weights: its routed output is exactly zero,
    and its shared expert stays. Attention is not touched, so this is layer drop, not block drop.

    Args:
        drop: layers to silence: a share of the MoE layers (a float) or a number.
    """

    stock = False
    drops = uneven = True
    together = "it drops the layers that change their input least, compared with all others"

    def __init__(self, drop: float | int = 0.25) -> None:
        self.drop = drop

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        self._count(len(blocks))
        return [facts.experts for facts in blocks]

    def look(self, layer: Layer) -> float:
        x_TD, y_TD = layer.features()
        return float(torch.nn.functional.cosine_similarity(x_TD.double(), (x_TD + y_TD).double(), dim=1).mean())

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        order = sorted(range(len(looks)), key=lambda i: (-looks[i], i))
        gone = set(order[: self._count(len(looks))])
        return [(cosine, i in gone) for i, cosine in enumerate(looks)]

    def change(self, layer: Layer, decision: Any) -> Change:
        cosine, gone = decision
        facts = layer.facts
        if not gone:
            return Change(range(facts.experts), report={"cosine": cosine, "dropped": False})
        each, size = facts.least // facts.groups, facts.experts // facts.groups
        keep = [group * size + i for group in range(facts.groups) for i in range(each)]
        silent = {i: layer.expert(e).map(torch.zeros_like) for i, e in enumerate(keep)}
        return Change(keep, silent, report={"cosine": cosine, "dropped": True})

    def _count(self, layers: int) -> int:
        count = round(layers * self.drop) if isinstance(self.drop, float) else self.drop
        if not 0 <= count <= layers:
            raise BadInput(f"drop {self.drop}: the model has {layers} MoE layers")
        return count
