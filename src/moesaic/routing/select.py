"""Selection: scores [T, E] -> experts [T, K], -1 for an empty slot. Ties go to the lowest expert."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The k highest scores per token, best first; a stable sort makes ties deterministic."""
    return torch.sort(scores_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def keep_best_groups(scores_TE: Tensor, groups: int, keep: int, by: Literal["max", "top2"]) -> Tensor:
    """Scores with every expert outside the `keep` best of `groups` equal groups set to -inf.

    A group's score is its largest member ("max", DeepSeek-V2) or the sum of its two largest ("top2", V3).
    """
    tokens, experts = scores_TE.shape
    grouped = scores_TE.detach().view(tokens, groups, experts // groups)
    score_TG = grouped.amax(-1) if by == "max" else grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, top_k(score_TG, keep), True)
    return scores_TE.masked_fill(~kept_TG.repeat_interleave(experts // groups, dim=1), float("-inf"))


def default_groups(experts: int) -> int:
    """Groups when nobody says: the largest of 8, 4, 2 that leaves at least two experts in each, else 1."""
    return next((groups for groups in (8, 4, 2) if experts % groups == 0 and experts >= 2 * groups), 1)


def check_groups(experts: int, k: int, groups: int, keep: int) -> None:
    """Raises BadInput for groups that do not divide the experts or cannot hold k of them."""
    if groups < 1 or experts % groups:
        raise BadInput(f"groups={groups} does not divide experts={experts}")
    if not 1 <= keep <= groups:
        raise BadInput(f"keep_groups={keep} must be between 1 and groups={groups}")
    if k > keep * (experts // groups):
        raise BadInput(f"k={k} experts cannot come from {keep} groups of {experts // groups}")


def top_p(probs_TE: Tensor, p: float) -> Tensor:
    """The smallest set whose mass exceeds p: n_t = 1 + #{j: cumulative_j <= p}, [T, E] with -1 behind the set.

    p >= 1 keeps all; rounding of the cumulative sum can neither drop the last expert nor run past it.
    """
    order_TE = torch.sort(probs_TE.detach(), dim=-1, descending=True, stable=True)
    if p >= 1:
        return order_TE.indices
    before_TE = order_TE.values.cumsum(-1).roll(1, -1)
    before_TE[:, 0] = -1.0
    return order_TE.indices.masked_fill(before_TE > p, -1)
