"""Mean: experts grouped by lot and averaged, the baseline of every other merge."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.surgery.cluster import Groups, by_lot
from moesaic.surgery.layer import Layer
from moesaic.surgery.merging import Merger


@register("merge", "mean", paper="2310.01334", card="surgery-and-steering.md#merge-sparse-moe", exact=False)
class Mean(Merger):
    """The plain mean of groups of equal size. Its first member is a group's centre.

    Args:
        keep: experts that stay: a share, or a number per layer.
        router: "map", "collapse" or "repeat": what becomes of the router's rows.
        align: match neurons to the group's centre first: "none", "weight" or "activation".
        seed: of the lot, drawn for each layer.
    """

    def __init__(self, keep: float | int = 0.5, router: str = "map", align: str = "none", seed: int = 0) -> None:
        super().__init__(keep, router, "mean", align)
        self.seed = seed

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        groups = by_lot(members, count, self.seed * 1_000_003 + layer.facts.number)
        return groups, [group[0] for group in groups]
