"""DeepSeekMoE's device-level balance loss."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "device", paper="2401.06066", card="layers-and-balancing.md#deepseekmoe")
class Device(Balancer):
    """sum_d f'_d P'_d over groups of consecutive experts: f' the mean of E f in the group, P' the sum of P.

    One expert per device gives the expert loss (`switch`); one device gives the constant 1.
    """

    def __init__(self, coefficient: float = 0.05, devices: int = 1):
        self.coefficient, self.devices = coefficient, devices

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        if routing.num_experts % self.devices:
            raise BadInput(f"devices={self.devices} does not divide {routing.num_experts} experts")
        f_D = (routing.num_experts * load_E(routing, scope)).view(self.devices, -1).mean(1)
        return (f_D * mean_probability_E(routing, scope).view(self.devices, -1).sum(1)).sum()
