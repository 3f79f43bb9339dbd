"""AdaptDHM: clusters with momentum choose the expert; the centres are moved by routing, not by gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.processes import sum_over_processes
from moesaic.core.recompute import recomputing
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding


@register("routing", "adaptdhm", paper="2211.12105", card="routing.md#adaptdhm", causal=False)
class AdaptDHM(Router):
    """s = x mu^T over unit centres; the arg-max cluster's expert runs, with weight 1. Made for the bank `weight_product`.

    Training first moves the centres, three times: mu = normalise(beta mu + (1 - beta) sum_i r_im x_i), r = softmax(s), so
    a row's choice depends on the whole batch. `lagged` routes by the centres as they were before the call: causal. `mean`
    takes the mean of the rows instead of their sum, which lets large batches overwhelm beta mu. `unit` normalises x for
    routing, so that rows of a large norm do not dominate. `reseed` puts the centre of a cluster without rows on the row
    farthest from its own (a collapsed cluster never recovers by itself). Sums are taken over all processes. The centres
    are a buffer: recomputation routes as the first forward did and moves nothing.
    """

    bank = "weight_product"

    def __init__(
        self,
        dim: int,
        experts: int,
        beta: float = 0.9,
        iterations: int = 3,
        mean: bool = False,
        unit: bool = False,
        lagged: bool = False,
        reseed: bool = False,
    ):
        super().__init__(experts, 1)
        if not 0 <= beta < 1 or iterations < 1:
            raise BadInput(f"beta={beta}, iterations={iterations}: 0 <= beta < 1, at least one iteration")
        self.beta, self.iterations, self.mean, self.unit = beta, iterations, mean, unit
        self.lagged, self.reseed, self.causal = lagged, reseed, lagged
        self.centres: Tensor
        self.routed: Tensor
        self.register_buffer("centres", normalize(torch.randn(experts, dim), dim=1))
        self.register_buffer("routed", self.centres.clone(), persistent=False)

    def flops_per_token(self, length: int = 1) -> float:
        """The choice, and in training two products per iteration."""
        return 2.0 * self.centres.numel() * (1 + 2 * self.iterations)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        with torch.no_grad(), torch.autocast(x_TD.device.type, enabled=False):
            rows_TD = x_TD.float()
            rows_TD = normalize(rows_TD, dim=1) if self.unit else rows_TD
            if ctx.training and not recomputing():
                before = self.centres.clone()
                self._move(rows_TD if ctx.mask is None else rows_TD[ctx.mask])
                self.routed.copy_(before if self.lagged else self.centres)
            centres_ED = self.routed if ctx.training else self.centres
            logits_TE = rows_TD @ centres_ED.float().T
        chosen_T1 = logits_TE.argmax(-1, keepdim=True)
        routing = Routing(logits_TE, logits_TE.softmax(-1), chosen_T1, torch.ones_like(chosen_T1, dtype=torch.float32))
        return empty_padding(routing, ctx)

    def _move(self, rows_TD: Tensor) -> None:
        centres_ED = self.centres.float()
        for _ in range(self.iterations):
            share_TE = (rows_TD @ centres_ED.T).softmax(-1)
            sums_ED = sum_over_processes(share_TE.T @ rows_TD)
            if self.mean:
                sums_ED = sums_ED / sum_over_processes(share_TE.sum(0)).clamp(min=1e-6).unsqueeze(1)
            centres_ED = normalize(self.beta * centres_ED + (1 - self.beta) * sums_ED, dim=1)
        if self.reseed and len(rows_TD):
            near_T, own_T = (rows_TD @ centres_ED.T).max(-1)
            empty = torch.nonzero(own_T.bincount(minlength=self.num_experts) == 0).flatten()
            far = (near_T / rows_TD.norm(dim=1).clamp(min=1e-6)).argsort()[: len(empty)]
            centres_ED[empty[: len(far)]] = normalize(rows_TD[far], dim=1)
        self.centres.copy_(centres_ED)
