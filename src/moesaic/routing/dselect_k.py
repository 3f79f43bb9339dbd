"""DSelect-k: K selectors, each a product of smooth-step bits that become a binary expert code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router
from moesaic.routing.smooth_step import smooth_step, sparse_routing


@register("routing", "dselect_k", paper="2106.03760", card="routing.md#comet")
class DSelectK(Router):
    """w = sum_j softmax(W x)_j r_j, r_j[e] the product over m = ceil(log2 E) bits of S or 1 - S by e's binary code.

    With `per_example` bits and mixture depend on the token, else they are parameters of their own. Bits start at
    U(-gamma, gamma) / 100. Codes of no expert (E not a power of two) may hold mass, so that weights sum to less than 1; the
    loss (balancing/dselect_k.py) keeps it out of them. Saturated bits leave at most K experts.
    """

    def __init__(self, dim: int, experts: int, k: int = 2, gamma: float = 1.0, per_example: bool = True):
        super().__init__(experts, k)
        if k < 1 or gamma <= 0:
            raise BadInput(f"k={k}, gamma={gamma}: at least one selector, and a positive gamma")
        self.gamma, self.per_example = gamma, per_example
        self.bits = max(1, math.ceil(math.log2(experts)))
        width = (dim,) if per_example else ()
        self.bit_weight = nn.Parameter(torch.empty(k * self.bits, *width).uniform_(-gamma / 100, gamma / 100))
        self.mix_weight = nn.Parameter(torch.empty(k, *width).uniform_(-0.05, 0.05))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        tokens = x_TD.shape[0]
        with torch.autocast(x_TD.device.type, enabled=False):
            weights = self.bit_weight.float(), self.mix_weight.float()
            bits, mix = (linear(x_TD.float(), w) if self.per_example else w.expand(tokens, -1) for w in weights)
            on_TKm = smooth_step(bits.reshape(tokens, self.k, self.bits), self.gamma)
            code_TKE = codes(on_TKm)[..., : self.num_experts]
            weights_TE = (mix.softmax(-1).unsqueeze(-1) * code_TKE).sum(1)
        return sparse_routing(weights_TE, weights_TE, ctx, code_TKE)


def codes(on_TKm: Tensor) -> Tensor:
    """The product over m bits of s or 1 - s for each of the 2^m binary codes, [T, K, 2^m]; bit j of a code weighs 2^j.

    Each bit doubles what is there: two products per code in all, where a product over its bits would take m.
    """
    level = on_TKm.new_ones(*on_TKm.shape[:2], 1)
    for s in on_TKm.split(1, 2):
        level = torch.cat([level * (1 - s), level * s], 2)
    return level
