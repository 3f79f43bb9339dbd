"""ShiftAddViT's balance loss: even latency instead of even counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


def unbiased_variation(values_E: Tensor) -> Tensor:
    """CV^2 with the unbiased variance; 0 for a single value."""
    if values_E.numel() < 2:
        return values_E.sum() * 0.0
    return values_E.var() / values_E.mean().square().clamp(min=1e-10)


@register("balancing", "latency", paper="2306.06446", card="layers-and-balancing.md#shiftaddvit")
class Latency(Balancer):
    """CV^2(lat_e * importance_e) + CV^2(lat_e * load_e); zero when tokens spread inversely to latency.

    importance_e sums the weights of the slots sent to e; load_e the chance that fresh noise keeps e among the chosen
    (a noisy router's scale in `routing.aux["noise_scale"]`), or the plain count, which has no gradient. Equal
    `latencies` (the default) make it the ordinary loss. The released engine has coefficient 0: it must be set.
    """

    def __init__(self, coefficient: float = 0.01, latencies: Sequence[float] | None = None):
        self.coefficient, self.latencies = coefficient, latencies

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        experts = routing.num_experts
        if self.latencies is not None and len(self.latencies) != experts:
            raise BadInput(f"latencies={list(self.latencies)}: one for each of the router's {experts} experts")
        given = [1.0] * experts if self.latencies is None else list(self.latencies)
        latency_E = torch.tensor(given, dtype=torch.float32, device=routing.logits_TE.device)
        load_E = self._load(routing, scope)
        return sum(
            (unbiased_variation(latency_E * values_E) for values_E in (importance(routing, scope), load_E)),
            latency_E.new_zeros(()),
        )

    @staticmethod
    def _load(routing: Routing, scope: Scope) -> Tensor:
        scale = routing.aux.get("noise_scale")
        if scale is None or routing.experts_TK is None:
            return routing.counts_E(scope.mask_T)
        kth_T1 = routing.logits_TE.topk(routing.experts_TK.shape[1], dim=-1).values[:, -1:]
        chance_TE = torch.special.ndtr((routing.logits_TE - kth_T1) / scale.clamp(min=1e-6))
        return (chance_TE if scope.mask_T is None else chance_TE[scope.mask_T]).sum(0)


def importance(routing: Routing, scope: Scope) -> Tensor:
    """Summed weights of each expert's slots, float32 [E]."""
    if routing.pairs is not None:
        token_S, expert_S, weight_S = routing.pairs
    elif routing.experts_TK is not None and routing.weights_TK is not None:
        expert_S, weight_S = routing.experts_TK.flatten(), routing.weights_TK.flatten()
        token_S = torch.arange(expert_S.numel(), device=expert_S.device) // routing.experts_TK.shape[1]
    else:
        raise BadInput("the latency loss weighs experts that were chosen: not for soft or keyed routings")
    keep_S = expert_S >= 0
    if scope.mask_T is not None:
        keep_S = keep_S & scope.mask_T[token_S]
    weight_S = torch.where(keep_S, weight_S.float(), 0.0)
    return weight_S.new_zeros(routing.num_experts).index_add(0, expert_S.clamp(min=0), weight_S)
