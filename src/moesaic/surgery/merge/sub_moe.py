"""Sub-MoE: experts of a cluster share a left factor, and only the right factors are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery import average
from moesaic.surgery.align import aligned
from moesaic.surgery.cluster import Groups, kmeans
from moesaic.surgery.layer import Layer
from moesaic.surgery.merging import Merger, centre_of
from moesaic.view.bank import ExpertWeights


@register("merge", "sub_moe", paper="2506.23266", card="surgery-and-steering.md#sub-moe", exact=False, needs={"R0", "A1"})
class SubMoe(Merger):
    """k-means on the directions of mean outputs (all tokens); then one SVD of the cluster's matrices side by side.

    Uncut (`rank` None), the merged matrix is exactly the usage-weighted mean, so the SVD is not even taken: what differs from
    plain averaging is the clustering, and with a rank the truncation. Vectors (biases) are averaged.

    Args:
        keep: experts that stay: a share, or a number per layer.
        router: "map", "collapse" or "repeat": what becomes of the router's rows.
        weights: of the average within a group: "frequency" or "mean".
        align: match neurons to the group's most used expert first: "none", "weight" or "activation".
        rank: singular values of the side-by-side matrix that stay; all by default.
    """

    def __init__(
        self,
        keep: float | int = 0.5,
        router: str = "map",
        weights: str = "frequency",
        align: str = "none",
        rank: int | None = None,
    ) -> None:
        super().__init__(keep, router, weights, align)
        if rank is not None and rank < 1:
            raise BadInput(f"rank {rank}: at least 1")
        self.rank = rank

    def group(self, layer: Layer, members: list[int], count: int) -> tuple[Groups, list[int]]:
        direction_ED = layer.statistics.mean("all_output")[members]
        direction_ED = direction_ED / direction_ED.norm(dim=1, keepdim=True).clamp(min=1e-300)
        found = [[members[i] for i in group] for group in kmeans(direction_ED, count)]
        return found, [centre_of(group, layer.statistics["selection_count"]) for group in found]

    def merge(self, layer: Layer, group: list[int], centre: int, share_G: Tensor) -> ExpertWeights:
        if self.rank is None:
            return super().merge(layer, group, centre, share_G)
        own = aligned(layer, centre, [e for e in group if e != centre], self.align)
        experts = [layer.expert(e) if e == centre else own[e] for e in group]
        plain = average.mean([{n: t for n, t in expert.items() if t.dim() == 1} for expert in experts], share_G)
        names = [name for name, tensor in experts[0].items() if tensor.dim() == 2]
        cut: dict[str, Tensor] = {
            name: average.shared_factor([expert[name] for expert in experts], share_G, self.rank) for name in names
        }
        return ExpertWeights(cut | {name: torch.as_tensor(tensor) for name, tensor in plain.items()})
