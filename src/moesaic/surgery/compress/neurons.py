"""Prune neurons inside experts: all experts of all layers to one smaller inner width, which stock classes hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.align import by_neuron
from moesaic.surgery.layer import Change, Facts, Layer, Method
from moesaic.view.bank import ExpertWeights

SCORES = ("abs", "square", "output", "norm")


@register(
    "compress", "neurons", card="surgery-and-steering.md#b-what-is-still-a-valid", exact=False,
    needs={"R1"},
)  # fmt: skip
class Neurons(Method):
    """A neuron is a gate row, an up row and a down column; the best I' of each expert stay, in their order, unchanged.

    An expert that no calibration token chose is ranked by its weights. Exact where the neurons that go are dead.

    Args:
        keep: neurons that stay: a share (of the expert bytes, that is), or a number per expert.
        by: "abs" (mean |h| over the routed tokens), "square" (mean h^2), "output" (mean |h| times the norm of the neuron's
            down column: what it adds to the output), "norm" (product of the norms of its rows and column).
        multiple: I' is rounded to a multiple of this, for kernels and groups of quantised weights.
    """

    def __init__(self, keep: float | int = 0.75, by: str = "output", multiple: int = 1) -> None:
        if by not in SCORES:
            raise BadInput(f"by {by!r}: one of {', '.join(SCORES)}")
        if multiple < 1 or keep <= 0 or (isinstance(keep, float) and keep > 1):
            raise BadInput(f"keep {keep}, multiple {multiple}: a share up to 1 or a number of neurons, and at least 1")
        self.keep, self.by, self.multiple = keep, by, multiple

    def inner(self, facts: Facts) -> int:
        if not isinstance(self.keep, float):
            count = int(self.keep)
        elif self.keep == 1:
            return facts.inner
        else:
            count = max(1, round(facts.inner * self.keep / self.multiple)) * self.multiple
        if not 0 < count <= facts.inner:
            raise BadInput(f"keep {self.keep}: the experts of {facts.name} have {facts.inner} neurons (already pruned?)")
        return count

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        counts = {self.inner(facts) for facts in blocks}
        if len(counts) > 1 or len({facts.inner for facts in blocks}) > 1:
            raise BadInput(
                f"neurons: the layers' experts would keep {sorted(counts)} neurons, and one number must hold for all"
            )
        return super().plan(blocks)

    def change(self, layer: Layer, decision: Any) -> Change:
        facts, count = layer.facts, self.inner(layer.facts)
        change = Change(range(facts.experts))
        if count == facts.inner:
            return change
        lost = []
        for e in range(facts.experts):
            expert = layer.expert(e)
            score_I = self.score(layer, e, expert)
            chosen = torch.argsort(score_I, descending=True, stable=True)[:count].sort().values
            change.experts[e] = cut(expert, chosen)
            lost.append(1 - float(score_I[chosen].sum() / score_I.sum().clamp(min=1e-300)))
        change.report = {"inner_before": facts.inner, "inner_after": count, "score_lost": lost}
        return change

    def score(self, layer: Layer, e: int, expert: ExpertWeights) -> Tensor:
        """Of every neuron, float64 [I]."""
        norm_I = torch.stack(
            [part.double().norm(dim=1) for name, part in by_neuron(expert).items() if "bias" not in name]
        ).prod(0)
        if self.by == "norm" or not layer.statistics["selection_count"][e]:
            return norm_I
        kind = "inner_square" if self.by == "square" else "inner_abs"
        mean_I = layer.statistics.mean(kind)[e]
        return mean_I * expert["down"].double().norm(dim=0) if self.by == "output" else mean_I


def cut(expert: ExpertWeights, neurons_I: Tensor) -> ExpertWeights:
    """The expert with these of its neurons."""
    found = {
        name: tensor[:, neurons_I] if name == "down" else tensor if name == "down_bias" else tensor[neurons_I]
        for name, tensor in expert.items()
    }
    return ExpertWeights({name: tensor.contiguous() for name, tensor in found.items()})
