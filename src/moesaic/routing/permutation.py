"""Learned expert permutations (COMET's local search): Sinkhorn of free logits while it lasts, then one hard assignment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.routing.follow import Follow
from moesaic.schedules.exponential import Exponential
from moesaic.schedules.linear import Linear


class Permutation(nn.Module):
    """P [R, E, E], doubly stochastic and then hard; weights g [.., R, E] become g P.

    For `steps` steps P = Sinkhorn(theta / tau) in log space, tau from 1e-3 down to 1e-7 log-linearly, sweeps from 20 up to
    150. The first training forward after them rounds P by the Hungarian algorithm, once, into `fixed_REE`, which
    checkpoints hold; theta gets no gradient from then on. theta starts at U(-0.05, 0.05).
    """

    def __init__(self, experts: int, copies: int, steps: int):
        super().__init__()
        self.theta_REE = nn.Parameter(torch.empty(copies, experts, experts).uniform_(-0.05, 0.05))
        self.tau, self.sweeps = Follow(Exponential(1e-3, 1e-7, steps), "tau"), Linear(20, 150, steps)
        self.steps = steps
        self.fixed_REE: Tensor
        self.is_fixed: Tensor
        self.register_buffer("fixed_REE", torch.zeros(copies, experts, experts, dtype=torch.uint8))
        self.register_buffer("is_fixed", torch.zeros((), dtype=torch.bool))

    def forward(self, ctx: RoutingContext) -> Tensor:
        if bool(self.is_fixed):
            return self.fixed_REE.float()
        step = self.tau.now(ctx)
        if step >= self.steps and ctx.training:
            for fixed_EE, theta_EE in zip(self.fixed_REE, self.theta_REE.detach(), strict=True):
                columns_E = hungarian(-theta_EE)
                fixed_EE.zero_()[torch.arange(len(columns_E), device=fixed_EE.device), columns_E] = 1
            self.is_fixed.fill_(True)
            return self.fixed_REE.float()
        return doubly_stochastic(self.theta_REE.float() / self.tau(ctx), int(self.sweeps.value(step)))

    @staticmethod
    def entropy(matrix_REE: Tensor) -> Tensor:
        """Entropy of the rows, both as they are and normalised to sum to 1, summed: the search's regulariser."""
        rows_REE = matrix_REE / matrix_REE.sum(-1, keepdim=True).clamp(min=1e-20)
        return sum((-(m * (m + 1e-20).log()).sum() for m in (matrix_REE, rows_REE)), matrix_REE.new_zeros(()))


def doubly_stochastic(logits_REE: Tensor, sweeps: int) -> Tensor:
    """Sinkhorn normalisation of rows and columns in log space."""
    for _ in range(sweeps):
        logits_REE = logits_REE - logits_REE.logsumexp(-1, keepdim=True)
        logits_REE = logits_REE - logits_REE.logsumexp(-2, keepdim=True)
    return logits_REE.exp()


def hungarian(cost_EE: Tensor) -> Tensor:
    """The column of each row in the cheapest one-to-one assignment, int64 [E]; exact, O(E^3), on the CPU.

    Shortest augmenting paths with potentials: rows enter one by one.
    """
    cost = cost_EE.detach().cpu().double()
    size = len(cost)
    row_of, u, v = [-1] * size, [0.0] * size, torch.zeros(size, dtype=torch.double)
    for row in range(size):
        slack = torch.full((size,), float("inf"), dtype=torch.double)
        done = torch.zeros(size, dtype=torch.bool)
        came = torch.full((size,), -1)
        here, at = row, -1
        while True:
            reduced = cost[here] - u[here] - v
            better = ~done & (reduced < slack)
            slack[better], came[better] = reduced[better], at
            nearest = slack.masked_fill(done, float("inf")).min(0)
            step, column = float(nearest.values), int(nearest.indices)
            u[row] += step
            for c in torch.nonzero(done).flatten().tolist():
                u[row_of[c]] += step
            v[done] -= step
            slack[~done] -= step
            done[column] = True
            at = column
            if row_of[column] < 0:
                break
            here = row_of[column]
        while at >= 0:
            before = int(came[at])
            row_of[at] = row if before < 0 else row_of[before]
            at = before
    column_of = torch.empty(size, dtype=torch.long)
    column_of[torch.tensor(row_of, dtype=torch.long)] = torch.arange(size)
    return column_of.to(cost_EE.device)
