"""Capacity: each expert takes at most C pairs; the rest is dropped and lives on in the residual path."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from moesaic.core.routing import Routing

Policy = Literal["position", "probs", "priority"]


def capacity(tokens: int, k: int, experts: int, factor: float) -> int:
    """C = max(4, int(factor * T * K / E)), never more than T. Card: routing.md, "Top-k softmax gating" 4."""
    return min(tokens, max(4, math.floor(factor * tokens * k / experts))) if tokens else 0


def apply_capacity(routing: Routing, capacity_E: Tensor | int, policy: Policy = "position") -> Routing:
    """Drop the pairs that overflow their expert.

    "position": all first choices queue before any second choice, then token order, so what an expert keeps is a
    prefix of its queue; "probs": an expert keeps its C largest weights; "priority": batch-prioritised, tokens queue
    by their largest weight (it looks at the whole batch: never in a causal decoder).
    """
    experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
    assert experts_TK is not None and weights_TK is not None
    tokens, k = experts_TK.shape
    ids_KT = experts_TK.T.reshape(-1)
    queue_S = torch.arange(ids_KT.numel(), device=ids_KT.device)
    if policy == "probs":
        queue_S = torch.sort(weights_TK.detach().T.reshape(-1), descending=True, stable=True).indices
    elif policy == "priority":
        order_T = torch.sort(weights_TK.detach().amax(1), descending=True, stable=True).indices
        queue_S = (torch.arange(k, device=ids_KT.device).unsqueeze(1) * tokens + order_T).reshape(-1)
    queued_S = ids_KT[queue_S]
    place_S = _place_in_queue(queued_S, routing.num_experts)
    limit = torch.as_tensor(capacity_E, device=ids_KT.device).expand(routing.num_experts)
    over_S = (queued_S >= 0) & (place_S >= limit[queued_S.clamp(min=0)])
    dropped_TK = torch.zeros_like(over_S).scatter_(0, queue_S, over_S).view(k, tokens).T
    return routing.drop(dropped_TK)


def _place_in_queue(expert_S: Tensor, experts: int) -> Tensor:
    """How many earlier entries of the queue name the same expert (without an [S, E] table)."""
    sorted_S, order_S = torch.sort(expert_S, stable=True)
    counts_E1 = torch.bincount(sorted_S + 1, minlength=experts + 1)
    start_E1 = torch.cumsum(counts_E1, 0) - counts_E1
    place_S = torch.arange(expert_S.numel(), device=expert_S.device) - start_E1[sorted_S + 1]
    return torch.empty_like(place_S).scatter_(0, order_S, place_S)
