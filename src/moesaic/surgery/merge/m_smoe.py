"""M-SMoE: align the neurons, group experts around the most used ones by their router logits, average by usage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.cluster import Groups, dominant
from moesaic.surgery.layer import Facts, Layer
from moesaic.surgery.merging import Merger
from moesaic.surgery.select import TOGETHER, check_scope
from moesaic.surgery.similarity import check_kind, similarity


@register("merge", "m_smoe", paper="2310.01334", card="surgery-and-steering.md#merge-sparse-moe", exact=False, needs={"R0"})
class MSmoe(Merger):
    """Dominant experts are the most used; every other joins the dominant one that is most similar, and is averaged into it.

    The budget is global as published: in each layer the most used expert counts as 1, and a layer keeps as many experts as
    have a usage above the n-th largest of all layers, n being `keep` summed over them; so layers differ, and one may keep a
    single expert. Neurons are brought into the order of the group's centre (published: of expert 0; the merged function is
    the same up to which of two equally good matchings is found). The released Mixtral script skips the alignment: `align=none`.

    Args:
        keep: experts that stay on average over the layers: a share, or a number per layer.
        router: "map", "collapse" or "repeat": what becomes of the router's rows.
        weights: of the average within a group: "frequency" (usage) or "mean".
        align: "weight" (assignment by the matrices), "activation" (by correlation on tier C's inputs) or "none".
        similarity: "router_logits" (cosine of logit columns), "router_rows", "weight", "output" (A1) or "routed_output" (R1).
        scope: "global" (the budget above) or "uniform" (as many in every layer). A collapsed router needs "uniform".
    """

    def __init__(
        self,
        keep: float | int = 0.5,
        router: str = "map",
        weights: str = "frequency",
        align: str = "weight",
        similarity: str = "router_logits",
        scope: str = "global",
    ) -> None:
        super().__init__(keep, router, weights, align)
        check_kind(similarity)
        check_scope(scope)
        if scope == "global" and router == "collapse":
            raise BadInput("scope global: layers then keep unequal numbers, and a collapsed router as few as one: use uniform")
        self.similarity, self.scope = similarity, scope
        self.uneven = scope == "global"
        self.reads_rows |= similarity == "router_rows"
        if scope == "global":
            self.together = TOGETHER
        self.needs |= {"output": {"A1"}, "routed_output": {"R1"}}.get(similarity, set())

    def look(self, layer: Layer) -> Tensor | None:
        return layer.statistics["selection_count"].double() if self.scope == "global" else None

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        counts = [self.count(facts) for facts in blocks]
        return global_groups(looks, sum(counts)) if self.scope == "global" else counts

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        used_E = layer.statistics["selection_count"].double()
        alike_EE = similarity(layer, self.similarity)
        groups, centres = dominant(used_E[members], alike_EE[members][:, members], count)
        return [[members[i] for i in group] for group in groups], [members[i] for i in centres]


def global_groups(usages: Sequence[Tensor], total: int) -> list[int]:
    """Groups of each layer: experts whose usage (the largest of a layer counting as 1) is above the (total + 1)-th largest."""
    shares = []
    for usage_E in usages:
        share_E = usage_E.double() / usage_E.sum().clamp(min=1)
        share_E[int(share_E.argmax())] = 1.0
        shares.append(share_E)
    every = torch.cat(shares).sort(descending=True).values
    if total >= len(every):
        return [len(share_E) for share_E in shares]
    bar = float(every[total])
    return [max(1, int((share_E > bar).sum())) for share_E in shares]
