"""Output variance: drop the experts that say nearly the same for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.layer import Change, Facts, Layer
from moesaic.surgery.scored import Scored
from moesaic.view.bank import ExpertWeights

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "output_variance", paper="2504.05586", card=CARD, exact=False, needs={"R0", "R1"})
class OutputVariance(Scored):
    """The sum over output values of their variance over the tokens routed to e.

    The definition is ours (the card infers it). An expert of no variance is a constant: its mean output would replace it
    exactly. An expert can say a constant only through a bias of its second product (GPT-OSS has one): there `replace` writes
    the mean into a zeroed expert behind the same row, which saves arithmetic to whoever skips zeros, but no bytes. Elsewhere
    experts are dropped.

    Args:
        keep: experts that stay: a share, or a number per layer.
        scope: "uniform" (as many in every layer) or "global" (one ranking of the whole model).
        replace: write the mean output into a zeroed expert instead of dropping it; needs experts with biases.
    """

    def __init__(self, keep: float | int = 0.5, scope: str = "uniform", replace: bool = False) -> None:
        super().__init__(keep, scope)
        self.replace = replace

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        counts = super().plan(blocks)
        return [facts.experts for facts in blocks] if self.replace else counts

    def score(self, layer: Layer) -> Tensor:
        return layer.statistics.output_variance_ED.sum(1)

    def change(self, layer: Layer, decision: Any) -> Change:
        score_E, kept = decision
        if not self.replace:
            return Change(kept, scores=score_E)
        mean_ED = layer.statistics.mean("output").float()
        gone = sorted(set(range(layer.facts.experts)) - set(kept))
        constant = {e: _constant(layer, e, mean_ED[e]) for e in gone}
        return Change(range(layer.facts.experts), constant, scores=score_E, report={"replaced_by_mean": gone})


def _constant(layer: Layer, e: int, mean_D: Tensor) -> ExpertWeights:
    if not layer.block.bank.biased:
        raise BadInput(f"{layer.facts.name}: replace writes a constant expert, and experts here have no bias: leave it out")
    return ExpertWeights({name: mean_D if name == "down_bias" else torch.zeros_like(w) for name, w in layer.expert(e).items()})
