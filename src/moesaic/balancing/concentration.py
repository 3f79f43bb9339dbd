"""Load concentration: fine-tuning that gathers the load on few modules, so that the rest can be removed."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, mean_probability_E
from moesaic.balancing.mutual_information import entropy
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "concentration", paper="2306.04640", card="layers-and-balancing.md#moduleformer")
class Concentration(Balancer):
    """H(m) = -sum_e P_e ln P_e: from ln E (even) down to 0 (one module)."""

    def __init__(self, coefficient: float = 0.01):
        self.coefficient = coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        return entropy(mean_probability_E(routing, scope))

    @staticmethod
    def removable(routing: Routing, scope: Scope, share: float = 0.1) -> Tensor:
        """Modules whose mean probability is below share / E, bool [E]: what may be cut after concentration."""
        p_E = mean_probability_E(routing, scope).detach()
        return torch.lt(p_E, share / len(p_E))
