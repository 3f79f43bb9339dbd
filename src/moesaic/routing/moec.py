"""MoEC: a cosine gate over clusters of experts, some of which are dropped for a while."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moesaic.core.context import RoutingContext
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.expert_dropout import ExpertDropout
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import default_groups, top_k
from moesaic.schedules.schedule import Scheduled


@register("routing", "moec", paper="2207.09094", card="routing.md#moec", needs={"step"})
class MoEC(Router):
    """l = cos(x R^T, w_e) in `rank` dimensions (X-MoE), top-1, weight sigmoid(l / temperature).

    alpha F(x) + (1 - alpha) x with residual experts F(x) = x + f(x) is x + alpha f(x): the bank's f, this weight and the
    host's residual. The temperature is learned from 0.07 with a floor of 1e-4; `probs_TE` uses 0.07 throughout, as the
    loss does (balancing/moec.py). `clusters` are groups of consecutive experts; in training floor((1 - rate) * size) of each,
    at least one, survive an interval of steps and the rest cannot be chosen (their logits are -inf). `rate=0` drops none
    and needs no step. Default clusters: 8, 4, 2 or 1, what divides the experts.
    """

    needs = frozenset({"step"})

    def __init__(
        self,
        dim: int,
        experts: int,
        clusters: int | None = None,
        rank: int = 32,
        rate: Scheduled = 0.5,
        interval: int = 250,
        seed: int = 0,
    ):
        super().__init__(experts, 1)
        self.clusters = default_groups(experts) if clusters is None else clusters
        self.dropout = ExpertDropout(experts, self.clusters, rate, interval, seed)
        self.needs = frozenset({"step"} if self.dropout.active else ())
        self.reduce = LinearScore(dim, rank)
        self.expert_Er = nn.Parameter(nn.init.orthogonal_(torch.empty(experts, rank), gain=0.1))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        u_Tr = self.reduce(x_TD, ctx)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = normalize(u_Tr, dim=-1) @ normalize(self.expert_Er.float(), dim=-1).T
        aux = {}
        survivors_E = self.dropout(ctx)
        if survivors_E is not None:
            survivors_E = survivors_E.to(x_TD.device)
            logits_TE = logits_TE.masked_fill(~survivors_E, float("-inf"))
            aux["survivors_E"] = survivors_E
        experts_T1 = top_k(logits_TE, 1)
        weights_T1 = (logits_TE.gather(1, experts_T1) / self.temperature.float().clamp(min=1e-4)).sigmoid()
        return empty_padding(Routing(logits_TE, (logits_TE / 0.07).softmax(-1), experts_T1, weights_T1, aux=aux), ctx)
