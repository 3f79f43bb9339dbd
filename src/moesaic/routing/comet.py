"""COMET: K differentiable trees whose leaves are experts, exactly sparse once trained; permutations search leaf orders."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.permutation import Permutation
from moesaic.routing.router import Router
from moesaic.routing.smooth_step import smooth_step, sparse_routing


@register("routing", "comet", paper="2306.02824", card="routing.md#comet", needs={"step"})
class Comet(Router):
    """w_{k,e} = v exp(a) / sum over all K E leaves of v exp(a): v the path product of smooth steps, a a linear map of x.

    Trees are heaps of E - 1 splits and E leaves (any E), all K evaluated at once; the left child gets S, the right 1 - S.
    Saturated splits have exactly one leaf per tree: at most K experts run. Before that all with a positive weight do; the
    entropy loss (balancing/comet.py) drives them there. Splits start at U(-gamma, gamma) / 100, leaves at U(-0.05, 0.05).
    For the first `search` steps (0 for none) learned permutations mix the experts, then they are rounded and kept: one for
    all trees, or one per tree with `permute_each`. A score of exactly 0 is an ordinary score here. By its nature it multiplies
    K (2 E - 1) rows where top-k multiplies E: at 64 experts and 8 trees it costs sixteen such routers.
    """

    def __init__(self, dim: int, experts: int, k: int = 2, gamma: float = 10.0, search: int = 100, permute_each: bool = False):
        super().__init__(experts, k)
        if k < 1 or gamma <= 0 or search < 0:
            raise BadInput(f"k={k}, gamma={gamma}, search={search}: at least one tree, gamma positive, search not negative")
        self.gamma = gamma
        self.needs = frozenset({"step"} if search else ())
        bound = gamma / 100
        self.split_weight = nn.Parameter(torch.empty((experts - 1) * k, dim).uniform_(-bound, bound))
        self.split_bias = nn.Parameter(torch.empty((experts - 1) * k).uniform_(-bound, bound))
        self.leaf_weight = nn.Parameter(torch.empty(experts * k, dim).uniform_(-0.05, 0.05))
        self.leaf_bias = nn.Parameter(torch.empty(experts * k).uniform_(-0.05, 0.05))
        self.permutation = Permutation(experts, k if permute_each else 1, search) if search else None

    def flops_per_token(self, length: int = 1) -> float:
        """The splits and leaves, and while the search lasts one product with each permutation."""
        mixing = 0 if self.permutation is None else self.permutation.theta_REE.numel()
        return 2.0 * (self.split_weight.numel() + self.leaf_weight.numel() + mixing)

    def paths(self, x_TD: Tensor) -> Tensor:
        """v [T, K, E]: each tree's distribution over its leaves, level by level from the root."""
        tokens = x_TD.shape[0]
        split_TKs = linear(x_TD, self.split_weight.float(), self.split_bias.float()).view(tokens, self.k, self.num_experts - 1)
        left_TKs = smooth_step(split_TKs, self.gamma)
        splits = self.num_experts - 1
        inner = [1]  # splits of each level; cut in one piece, for every slice's gradient would be as large as the whole
        while sum(inner) < splits:
            inner.append(min(2 * inner[-1], splits - sum(inner)))
        level, leaves = x_TD.new_ones(tokens, self.k, 1), []
        for s in left_TKs.split(inner if splits else [], 2):
            above, done = level.split([s.shape[2], level.shape[2] - s.shape[2]], 2)
            leaves.append(done)
            level = torch.stack([above * s, above * (1 - s)], -1).flatten(2)
        return torch.cat([*leaves, level], 2)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            path_TKE = self.paths(x_TD)
            score_TKE = linear(x_TD, self.leaf_weight.float(), self.leaf_bias.float()).view_as(path_TKE)
            open_TKE = path_TKE > 0
            best_T11 = score_TKE.detach().masked_fill(~open_TKE, float("-inf")).amax((1, 2), keepdim=True)
            mass_TKE = path_TKE * (score_TKE - best_T11).clamp(max=0).exp()
            permutation_REE = None if self.permutation is None else self.permutation(ctx)
            if permutation_REE is not None and len(permutation_REE) > 1:
                mass_TKE = torch.einsum("tke,kef->tkf", mass_TKE, permutation_REE)
            mass_TE = mass_TKE.sum(1)
            if permutation_REE is not None and len(permutation_REE) == 1:  # one order for all trees: their sum is as good
                mass_TE = mass_TE @ permutation_REE[0]
        routing = sparse_routing(mass_TE, mass_TE / mass_TE.sum(1, keepdim=True), ctx, path_TKE)
        if ctx.training and permutation_REE is not None and permutation_REE.requires_grad:
            routing.aux["permutation_entropy"] = Permutation.entropy(permutation_REE)
        return routing
