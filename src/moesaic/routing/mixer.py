"""MixER: the gate is solved, not trained: K-means on context vectors, the best expert per cluster, least squares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.task_rows import ids_of


@register("routing", "mixer", paper="2502.05335", card="routing.md#mixer", needs={"task_ids"})
class Mixer(Router):
    """logits = [xi ; 1] G of a token's environment (its task id); only the arg-max expert runs, with weight 1.

    The contexts `context_AC` are parameters: a model that reads them (beside the router) trains them. G is a buffer that
    no gradient reaches: every few steps `solve(loss_AE)` is given the loss of every expert on every environment
    (`loss_matrix` measures it) and clusters the contexts, assigns experts one to one, and fits G. The released arg-max
    takes all logits within 1e-6 of the largest and can fire two experts; here ties go to the first.
    """

    needs = frozenset({"task_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        environments: int = 2,
        context: int = 16,
        noise: float = 1e-4,
        iterations: int = 20,
        tolerance: float = 1e-3,
        assignment: Literal["greedy", "optimal"] = "greedy",
    ):
        super().__init__(experts, 1)
        if environments < 1 or context < 1 or iterations < 1:
            raise BadInput(f"environments={environments}, context={context}, iterations={iterations}: at least 1 of each")
        if assignment not in ("greedy", "optimal") or (assignment == "optimal" and experts > 8):
            raise BadInput(f"assignment={assignment!r} of {experts} experts: greedy, or optimal for at most 8")
        self.noise, self.iterations, self.tolerance, self.assignment = noise, iterations, tolerance, assignment
        self.context_AC = nn.Parameter(torch.zeros(environments, context).uniform_(-1, 1))
        bound = (context + 1) ** -0.5
        self.gate: Tensor
        self.centroids: Tensor
        self.has_centroids: Tensor
        self.register_buffer("gate", torch.empty(context + 1, experts).uniform_(-bound, bound))
        self.register_buffer("centroids", torch.zeros(experts, context))
        self.register_buffer("has_centroids", torch.zeros((), dtype=torch.bool))

    def flops_per_token(self, length: int = 1) -> float:
        """Nothing: tokens look their environment up."""
        return 0.0

    @property
    def fixed_flops(self) -> float:
        return 2.0 * len(self.context_AC) * self.gate.numel()

    def logits(self) -> Tensor:
        """Gate logits of every environment, float32 [A, E]."""
        with torch.autocast(self.gate.device.type, enabled=False):
            return with_one(self.context_AC.float()) @ self.gate.detach().float()

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        task_T = ids_of(ctx, "task_ids", len(self.context_AC), "mixer")
        logits_TE = self.logits()[task_T]
        chosen_T1 = logits_TE.argmax(-1, keepdim=True)
        routing = Routing(logits_TE, logits_TE.softmax(-1), chosen_T1, torch.ones_like(chosen_T1, dtype=torch.float32))
        return empty_padding(routing, ctx)

    @torch.no_grad()
    def solve(self, loss_AE: Tensor, generator: torch.Generator | None = None) -> bool:
        """Fit the gate to the losses of every expert on every environment, in the order of `context_AC`.

        False, with the gate untouched and the centroids forgotten, when a cluster is empty or K-means did not settle.
        Raises BadInput for a matrix of another shape.
        """
        contexts_AC = self.context_AC.float()
        if loss_AE.shape != (len(contexts_AC), self.num_experts) or not loss_AE.isfinite().all():
            raise BadInput(f"loss_AE {tuple(loss_AE.shape)}: a finite loss for {len(contexts_AC)} environments, E experts")
        start = self.centroids.float()
        if not self.has_centroids:
            start = torch.empty_like(start).uniform_(-1e-3, 1e-3, generator=generator)
        cluster_A, centroids = k_means(contexts_AC, start, self.iterations, self.tolerance)
        if cluster_A is None:
            self.has_centroids.fill_(False)
            return False
        self.centroids.copy_(centroids)
        self.has_centroids.fill_(True)
        cost_ME = torch.stack([loss_AE[cluster_A == m].median(0).values for m in range(self.num_experts)])
        expert_M = assign(cost_ME, self.assignment)
        target_AE = torch.eye(self.num_experts, device=contexts_AC.device)[expert_M[cluster_A]]
        noisy_AC = contexts_AC + self.noise * torch.randn(contexts_AC.shape, generator=generator).to(contexts_AC)
        solution = torch.linalg.lstsq(with_one(noisy_AC), target_AE, driver="gelsd" if noisy_AC.is_cpu else None).solution
        self.gate.copy_(solution)
        return True


def with_one(x_AC: Tensor) -> Tensor:
    return torch.cat([x_AC, torch.ones_like(x_AC[:, :1])], 1)


def k_means(x_AC: Tensor, start_MC: Tensor, iterations: int, tolerance: float) -> tuple[Tensor | None, Tensor]:
    """Cluster of each row and the centroids, by mean absolute distance; None where a cluster empties or it does not settle."""
    centroids = start_MC
    for _ in range(iterations):
        cluster_A = (x_AC.unsqueeze(1) - centroids).abs().mean(-1).argmin(1)
        if cluster_A.bincount(minlength=len(centroids)).min() == 0:
            return None, start_MC
        moved = torch.stack([x_AC[cluster_A == m].mean(0) for m in range(len(centroids))])
        change = (moved - centroids).abs().mean()
        centroids = moved
        if change < tolerance:
            return (x_AC.unsqueeze(1) - centroids).abs().mean(-1).argmin(1), centroids
    return None, start_MC


def assign(cost_ME: Tensor, how: Literal["greedy", "optimal"] = "greedy") -> Tensor:
    """Expert of each cluster, each used once: in cluster order the cheapest one left, or the cheapest sum of all orders."""
    clusters = len(cost_ME)
    if how == "optimal":
        rows = torch.arange(clusters)
        best = min(permutations(range(clusters)), key=lambda order: cost_ME[rows, list(order)].sum().item())
        return torch.tensor(best, device=cost_ME.device)
    left_ME, chosen = cost_ME.clone(), []
    for row in range(clusters):
        chosen.append(int(left_ME[row].argmin()))
        left_ME[:, chosen[-1]] = float("inf")
    return torch.tensor(chosen, device=cost_ME.device)


@torch.no_grad()
def loss_matrix(loss: Callable[[int, int], Tensor], environments: int, experts: int) -> Tensor:
    """`loss(environment, expert)` for every pair, float32 [A, E]: M forward passes over every environment."""
    return torch.tensor([[loss(a, e).item() for e in range(experts)] for a in range(environments)])
