"""ProMoE's routing contrastive loss: a prototype is pulled to the mean of its tokens and pushed from the others'."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesaic.balancing.balancer import Balancer, Scope
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "promoe", paper="2510.24711", card="routing.md#promoe")
class PrototypeContrast(Balancer):
    """Cross-entropy of cos(c_i, m_j) / temperature with target j = i, over the experts that have tokens.

    Reads what the promoe router leaves in `routing.aux` (training only); 0 with fewer than two such experts. log(n) when all
    cosines are equal. Means are those of the local call: a shard's loss is not the global batch's.
    """

    def __init__(self, coefficient: float = 1.0, temperature: float = 0.07):
        self.coefficient, self.temperature = coefficient, temperature

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        prototype_ED, mean_ED = routing.aux.get("prototype_ED"), routing.aux.get("token_mean_ED")
        if prototype_ED is None or mean_ED is None:
            return routing.logits_TE.new_zeros(())
        used_E = routing.aux["used_E"]
        if int(used_E.sum()) < 2:
            return prototype_ED.sum() * 0.0
        cos_EE = prototype_ED[used_E] @ mean_ED[used_E].T / self.temperature
        return cross_entropy(cos_EE, torch.arange(len(cos_EE), device=cos_EE.device))
