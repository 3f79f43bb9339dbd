"""Group the experts of a layer: around dominant ones, by linkage, spectrally, or by k-means.

Every function takes numbers and returns groups: lists of positions that together hold each once, none empty, each ascending,
in the order of their first member. The result does not depend on the order of the experts (up to ties).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage as scipy_linkage
from torch import Tensor

from moesaic.core.errors import BadInput

Groups = list[list[int]]
LINKAGES = ("average", "ward", "complete", "single")


def to_groups(labels: Sequence[int]) -> Groups:
    found: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(int(label), []).append(place)
    return list(found.values())


def dominant(usage_E: Tensor, similarity_EE: Tensor, count: int) -> tuple[Groups, list[int]]:
    """The `count` most used are centres, and every other joins the centre that is most similar to it; groups and centres."""
    centres = torch.argsort(usage_E, descending=True, stable=True)[:count].tolist()
    labels = list(range(len(usage_E)))
    for e in range(len(usage_E)):
        if e not in centres:
            labels[e] = centres[int(similarity_EE[e, centres].argmax())]
    groups = to_groups(labels)
    return groups, [next(e for e in group if e in centres) for group in groups]


def merges(features_EN: Tensor, linkage: str) -> np.ndarray:
    """SciPy's table of merges by Euclidean distance: two clusters, their distance, the new cluster's size; one row each."""
    if linkage not in LINKAGES:
        raise BadInput(f"linkage {linkage!r}: one of {', '.join(LINKAGES)}")
    return scipy_linkage(features_EN.double().cpu().numpy(), method=linkage)


def hierarchical(features_EN: Tensor, count: int, linkage: str = "average") -> Groups:
    """Agglomerative clustering cut at exactly `count` groups, ties or not."""
    E = len(features_EN)
    if count >= E:
        return [[e] for e in range(E)]
    members: dict[int, list[int]] = {e: [e] for e in range(E)}
    for step, row in enumerate(merges(features_EN, linkage)[: E - count]):
        members[E + step] = members.pop(int(row[0])) + members.pop(int(row[1]))
    return sorted(sorted(group) for group in members.values())


def spectral(affinity_EE: Tensor, count: int) -> Groups:
    """Normalised Laplacian, its first `count` eigenvectors as rows of unit length, k-means."""
    E = len(affinity_EE)
    if count >= E:
        return [[e] for e in range(E)]
    weight_EE = affinity_EE.double().clamp(min=0)
    degree_E = weight_EE.sum(1).clamp(min=1e-300).rsqrt()
    near_EE = degree_E[:, None] * weight_EE * degree_E
    _, vectors_EE = torch.linalg.eigh((near_EE + near_EE.T) / 2)
    rows_EN = vectors_EE[:, -count:]
    rows_EN = rows_EN / rows_EN.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return kmeans(rows_EN, count)


def kmeans(points_EN: Tensor, count: int, rounds: int = 100, restarts: int = 10) -> Groups:
    """Lloyd's algorithm from `restarts` starts, the one of least squared distance.

    A start is a point and then, again and again, the point farthest from those taken. The first points are those farthest
    from the mean: no numbers are drawn, and relabelling the points relabels the groups.
    """
    points_EN = points_EN.double()
    E = len(points_EN)
    if count >= E:
        return [[e] for e in range(E)]
    starts = torch.argsort((points_EN - points_EN.mean(0)).norm(dim=1), descending=True, stable=True)[:restarts]
    runs = [_lloyd(points_EN, _far_apart(points_EN, int(start), count), rounds) for start in starts]
    _, labels = min(runs, key=lambda run: run[0])
    return to_groups(labels)


def _far_apart(points_EN: Tensor, first: int, count: int) -> Tensor:
    chosen = [first]
    distance_E = (points_EN - points_EN[first]).norm(dim=1)
    while len(chosen) < count:
        distance_E[chosen] = -1  # copies of a chosen point lie at distance 0, and may have to be taken
        chosen.append(int(distance_E.argmax()))
        distance_E = torch.minimum(distance_E, (points_EN - points_EN[chosen[-1]]).norm(dim=1))
    return points_EN[chosen].clone()


def _lloyd(points_EN: Tensor, centres_KN: Tensor, rounds: int) -> tuple[float, list[int]]:
    labels_E = torch.full((len(points_EN),), -1)
    for _ in range(rounds):
        distance_EK = torch.cdist(points_EN, centres_KN)
        new_E = distance_EK.argmin(1)
        for k in range(len(centres_KN)):  # an empty cluster takes the point worst served, from a cluster that can spare it
            if not (new_E == k).any():
                spare_E = torch.bincount(new_E, minlength=len(centres_KN))[new_E] > 1
                own_E = distance_EK.gather(1, new_E[:, None])[:, 0].masked_fill(~spare_E, -1)
                new_E[int(own_E.argmax())] = k
        if torch.equal(new_E, labels_E):
            break
        labels_E = new_E
        centres_KN = torch.stack([points_EN[labels_E == k].mean(0) for k in range(len(centres_KN))])
    return float((points_EN - centres_KN[labels_E]).square().sum()), labels_E.tolist()


def by_lot(members: Sequence[int], count: int, seed: int) -> Groups:
    """Random groups whose sizes differ by one at most."""
    order = np.random.default_rng(seed).permutation(np.asarray(members))
    return sorted(sorted(int(e) for e in part) for part in np.array_split(order, count))
