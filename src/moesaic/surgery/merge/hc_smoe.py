"""HC-SMoE: hierarchical clustering of the experts' mean outputs, merged by usage."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.cluster import LINKAGES, Groups, hierarchical
from moesaic.surgery.layer import Layer
from moesaic.surgery.merging import Merger, centre_of


@register("merge", "hc_smoe", paper="2410.08589", card="surgery-and-steering.md#hc-smoe", exact=False, needs={"R0", "A1"})
class HcSmoe(Merger):
    """An expert's feature is its mean output over ALL tokens, whatever the router chose; as many groups in every layer.

    Args:
        keep: experts that stay: a share, or a number per layer.
        router: "map", "collapse" or "repeat": what becomes of the router's rows.
        weights: of the average within a group: "frequency" or "mean".
        align: match neurons to the group's most used expert first: "none" (default), "weight" or "activation".
        linkage: of the agglomerative clustering by Euclidean distance: "average" (the paper's), "ward" (the released code's
            default), "complete" or "single".
        feature: "output" (tier A1, the paper's) or "routed_output" (tier R1: over the tokens routed to each; another method).
    """

    def __init__(
        self,
        keep: float | int = 0.5,
        router: str = "map",
        weights: str = "frequency",
        align: str = "none",
        linkage: str = "average",
        feature: str = "output",
    ) -> None:
        super().__init__(keep, router, weights, align)
        for name, value, known in (("linkage", linkage, LINKAGES), ("feature", feature, ("output", "routed_output"))):
            if value not in known:
                raise BadInput(f"{name} {value!r}: one of {', '.join(known)}")
        self.linkage, self.feature = linkage, feature
        self.needs |= {"R1"} if feature == "routed_output" else set()

    def features(self, layer: Layer) -> Tensor:
        return layer.statistics.mean("all_output" if self.feature == "output" else "output")

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        groups = hierarchical(self.features(layer)[members], count, self.linkage)
        found = [[members[i] for i in group] for group in groups]
        used_E = layer.statistics["selection_count"]
        return found, [centre_of(group, used_E) for group in found]
