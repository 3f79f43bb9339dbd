"""Product keys: an expert's key is a pair of sub-keys, so the best of n1 * n2 are found among n1 + n2."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather


@register("routing", "product_key", paper="2508.15099", card="layers-and-balancing.md#hydra")
class ProductKey(Router):
    """q = [q1; q2] = W x; expert i * n2 + j scores q1 . a_i + q2 . b_j; the best k of each side make k * k candidates, of
    which the best `keep` (default k) run with the softmax of their scores.

    The best k over all experts are always among the candidates. n1 is the largest divisor of `experts` up to its root
    (64 and 64 for 4096). Hydra's toy keeps all 16 candidates of k = 4: keep=16. The logits are the full [T, E] sums,
    which losses and traces read.
    """

    bank = "product_key"

    def __init__(self, dim: int, experts: int, k: int = 4, key: int = 64, keep: int | None = None):
        keep = k if keep is None else keep
        super().__init__(experts, keep)
        self.n1 = next(n for n in range(isqrt(experts), 0, -1) if experts % n == 0)
        self.n2, self.side = experts // self.n1, k
        if keep > min(k, self.n1) * min(k, self.n2):
            raise BadInput(f"keep={keep}: the best k={k} of {self.n1} and {self.n2} sub-keys do not make that many candidates")
        self.query = LinearScore(dim, 2 * key, std=dim**-0.5)
        self.keys1_NC = nn.Parameter(torch.empty(self.n1, key).normal_(std=key**-0.5))
        self.keys2_NC = nn.Parameter(torch.empty(self.n2, key).normal_(std=key**-0.5))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        query_TC = self.query(x_TD, ctx)
        with torch.autocast(x_TD.device.type, enabled=False):
            q1_TC, q2_TC = query_TC.chunk(2, -1)
            l1_TN, l2_TN = linear(q1_TC, self.keys1_NC.float()), linear(q2_TC, self.keys2_NC.float())
        logits_TE = (l1_TN.unsqueeze(2) + l2_TN.unsqueeze(1)).flatten(1)
        i_TK, j_TK = top_k(l1_TN, self.side), top_k(l2_TN, self.side)
        candidates_TC = (i_TK.unsqueeze(2) * self.n2 + j_TK.unsqueeze(1)).flatten(1)
        experts_TK = candidates_TC.gather(1, top_k(logits_TE.gather(1, candidates_TC), self.k))
        weights_TK = gather(logits_TE, experts_TK).softmax(-1)
        return empty_padding(Routing(logits_TE, logits_TE.softmax(-1), experts_TK, weights_TK), ctx)
