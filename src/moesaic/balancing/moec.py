"""MoEC's loss: load balance, and equal routing mass inside each cluster of experts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "moec", paper="2207.09094", card="routing.md#moec")
class MoECLoad(Balancer):
    """E * (sum_e m_e c_e + spread * V), m the mean probability, c the share of tokens.

    `kind` 1: V is the mean over clusters of the unbiased variance of m inside the cluster; 0: the variance over all
    experts; 2: kind 1 over exp(best cluster mean - second best). Dropped experts (`routing.aux["survivors_E"]`) are in no
    variance. The released m is a sum over tokens, so that V grows with their square; here it is the mean, whatever the
    batch: to compare, `spread` stands for lambda times the tokens.
    """

    def __init__(self, coefficient: float = 0.01, clusters: int | None = None, spread: float = 1.0, kind: Literal[0, 1, 2] = 1):
        if kind not in (0, 1, 2):
            raise BadInput(f"kind={kind}: one of 0, 1, 2")
        self.coefficient, self.clusters, self.spread, self.kind = coefficient, clusters, spread, kind

    def bind(self, router: nn.Module) -> MoECLoad:
        self.clusters = getattr(router, "clusters", 1) if self.clusters is None else self.clusters
        return self

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        clusters = 1 if self.clusters is None or self.kind == 0 else self.clusters
        if routing.num_experts % clusters:
            raise BadInput(f"clusters={clusters} does not divide {routing.num_experts} experts")
        m_E = mean_probability_E(routing, scope)
        total = (m_E * (load_E(routing, scope) + 1e-6)).sum()
        survivors_E = routing.aux.get("survivors_E")
        alive_E = torch.ones_like(m_E, dtype=torch.bool) if survivors_E is None else survivors_E
        m_Ge = m_E[alive_E].view(clusters, -1)  # every cluster keeps as many
        spread = m_Ge.var(1).mean() if m_Ge.shape[1] > 1 else m_E.sum() * 0.0
        if self.kind == 2 and clusters > 1:
            best = m_Ge.mean(1).sort(descending=True).values
            spread = spread / (best[0] - best[1]).exp()
        return routing.num_experts * (total + self.spread * spread)
