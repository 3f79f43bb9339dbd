"""Which experts stay, by a score per expert: as many in every layer, or ranked over the whole model.

In group-limited routers (Facts.groups > 1) every group of a layer keeps as many, whatever the scope: the unit that is
ranked is then one expert of each group. E experts of a layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.layer import Facts, best, count_kept

Scope = Literal["uniform", "global"]

TOGETHER = "scope=global is one ranking of the experts of all layers; with scope=uniform every layer is decided by itself"


def check_scope(scope: str) -> None:
    """Raises BadInput for a scope that does not exist."""
    if scope not in get_args(Scope):
        raise BadInput(f"scope {scope!r}: {' or '.join(get_args(Scope))}")


def select(
    scores: Sequence[Tensor],
    blocks: Sequence[Facts],
    keep: float | int,
    scope: str = "uniform",
    protected: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """Experts that stay of each layer, ascending; the highest scores, ties to the lower number (and the lower layer).

    "uniform": `keep` of every layer. "global": as many over the whole model, by one ranking; every layer keeps what its
    router needs (`Facts.least`), and the rest goes to the highest scores wherever they are. Protected experts come first.
    """
    check_scope(scope)
    guarded: Sequence[Sequence[int]] = protected or [()] * len(blocks)
    counts = [count_kept(facts, keep) for facts in blocks]
    if scope == "global":
        counts = global_counts(scores, blocks, sum(counts), guarded)
    parts = zip(scores, counts, blocks, guarded, strict=True)
    return [best(score_E, count, facts.groups, mine) for score_E, count, facts, mine in parts]


def global_counts(
    scores: Sequence[Tensor], blocks: Sequence[Facts], total: int, protected: Sequence[Sequence[int]]
) -> list[int]:
    """How many experts each layer keeps when `total` of the whole model stay; never more than `total`."""
    counts = [min(facts.least, facts.experts) for facts in blocks]
    units = []
    for number, (score_E, facts) in enumerate(zip(scores, blocks, strict=True)):
        score_E = score_E.double().clone()
        score_E[list(protected[number])] = torch.inf
        ranked_GN = score_E.reshape(facts.groups, -1).sort(1, descending=True).values
        units += [
            (-float(value), number, facts.groups)
            for place, value in enumerate(ranked_GN.mean(0).tolist())
            if place >= facts.least // facts.groups
        ]
    left = total - sum(counts)
    if left < 0:
        raise BadInput(f"keep: {total} experts in all, but the routers of this model need {sum(counts)}")
    for _, number, size in sorted(units):
        if size <= left:
            counts[number] += size
            left -= size
    return counts
