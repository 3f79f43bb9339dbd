"""Solvers that match tokens with experts under marginals. All rows are tokens t of one pool: t, E -> plan [t, E]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NARROW = 30.0
"""Logits (divided by epsilon) that lie no further apart than this keep every sum of `sinkhorn` inside float32."""


def sinkhorn(logits_tE: Tensor, epsilon: float = 1.0, iterations: int = 20) -> Tensor:
    """Entropic plan: rows sum to 1 exactly, columns to t / E in the limit; differentiable.

    max <l, P> + epsilon H(P). epsilon -> 0 approaches the balanced assignment, and asks for more iterations. The plan is
    diag(u) K diag(v) with K = exp(l / epsilon), and a sweep two products of K with a vector; where K would leave
    float32's range, `sinkhorn_in_logs`, the twin, is taken.
    """
    log_tE = logits_tE / epsilon
    if log_tE.numel() == 0 or not bool((log_tE.detach().amax(1) - log_tE.detach().amin(1)).max() <= NARROW):
        return sinkhorn_in_logs(logits_tE, epsilon, iterations)
    kernel_tE = log_tE.softmax(-1)
    column = logits_tE.shape[0] / logits_tE.shape[1]
    u_t1, v_1E = kernel_tE.new_ones(len(kernel_tE), 1), kernel_tE.new_ones(1, kernel_tE.shape[1])
    for _ in range(iterations):
        v_1E = column / (u_t1.T @ kernel_tE)
        u_t1 = 1 / (kernel_tE @ v_1E.T)
    return u_t1 * kernel_tE * v_1E


def sinkhorn_in_logs(logits_tE: Tensor, epsilon: float = 1.0, iterations: int = 20) -> Tensor:
    """`sinkhorn` by row and column normalisation in log space, for any logits."""
    log_tE = logits_tE / epsilon
    column = torch.log(torch.tensor(logits_tE.shape[0] / logits_tE.shape[1]))
    log_tE = log_tE - log_tE.logsumexp(1, keepdim=True)
    for _ in range(iterations):
        log_tE = log_tE - log_tE.logsumexp(0, keepdim=True) + column
        log_tE = log_tE - log_tE.logsumexp(1, keepdim=True)
    return log_tE.exp()


def sparse_simplex(x_nm: Tensor, k: int, stable: bool = True) -> Tensor:
    """Each row projected on the simplex with at most k nonzeros: its k largest entries projected, zeros elsewhere.

    Ties go to the lowest column; without `stable` to any, which is several times as fast for small k.
    """
    if stable:
        best = torch.sort(x_nm, dim=1, descending=True, stable=True)
        top_nk, index_nk = best.values[:, :k], best.indices[:, :k]
    else:
        top_nk, index_nk = x_nm.topk(min(k, x_nm.shape[1]), dim=1)
    cumulative_nk = top_nk.cumsum(1) - 1
    rank_k = torch.arange(1, top_nk.shape[1] + 1, device=x_nm.device, dtype=x_nm.dtype)
    support_n1 = (top_nk * rank_k > cumulative_nk).sum(1, keepdim=True)
    threshold_n1 = cumulative_nk.gather(1, support_n1 - 1) / support_n1
    return torch.zeros_like(x_nm).scatter(1, index_nk, (top_nk - threshold_n1).clamp(min=0))


def sparse_plan(
    gain_nm: Tensor, target_m: Tensor, mass: float, k: int, gamma: float = 1.0, steps: int = 20, rate: float = 0.01
) -> Tensor:
    """Transport whose n rows each spread `mass` over at most k of m columns, aiming at column sums `target_m`; [n, m].

    Maximises <gain, P> - gamma / 2 |P|^2 by Adam on the semi-dual in alpha [m] (gradient target - column sums); the last
    projection carries gradient to the gains, alpha does not (Danskin). Row sums and sparsity hold for any alpha, column
    sums at an optimum without dual gap only. k >= m is quadratically regularised transport.
    """
    alpha_m, mean_m, square_m = (torch.zeros_like(target_m) for _ in range(3))
    with torch.no_grad():
        for step in range(1, steps + 1):
            p_nm = sparse_simplex((alpha_m + gain_nm) / (gamma * mass), k, stable=False)
            slope_m = target_m - mass * p_nm.sum(0)
            mean_m = 0.9 * mean_m + 0.1 * slope_m
            square_m = 0.999 * square_m + 0.001 * slope_m.square()
            scale_m = (square_m / (1 - 0.999**step)).sqrt() + 1e-8
            alpha_m = alpha_m + rate * mean_m / (1 - 0.9**step) / scale_m
    return mass * sparse_simplex((alpha_m + gain_nm) / (gamma * mass), k)


@torch.no_grad()
def balanced_assignment(scores_tE: Tensor, precision: float = 0.01) -> Tensor:
    """Expert of each token, int64 [t]: every expert gets t / E tokens (the first t mod E one more), by auction.

    The sum of scores is within t * precision * (max - min) of the best. Free tokens bid for their best expert
    by what it is worth above their second best; a full expert keeps its highest bids, and its price is the lowest of them.
    """
    tokens, experts = scores_tE.shape
    device = scores_tE.device
    capacity_E = tokens // experts + (torch.arange(experts, device=device) < tokens % experts).long()
    if experts == 1:
        return torch.zeros(tokens, dtype=torch.long, device=device)
    scores_tE = scores_tE.double().masked_fill(capacity_E == 0, float("-inf"))
    finite = scores_tE[:, capacity_E > 0]
    spread = float(finite.max() - finite.min()) if tokens else 0.0
    step = max(precision * spread, 1e-9)
    price_E = torch.zeros(experts, dtype=torch.double, device=device)
    expert_t = torch.full((tokens,), -1, dtype=torch.long, device=device)
    bid_t = torch.zeros(tokens, dtype=torch.double, device=device)
    while len(free_u := torch.nonzero(expert_t < 0).flatten()):
        best_u2 = (scores_tE[free_u] - price_E).topk(2, dim=1)
        expert_u = best_u2.indices[:, 0]
        above_u = (best_u2.values[:, 0] - best_u2.values[:, 1]).clamp(max=2 * spread)
        expert_t[free_u], bid_t[free_u] = expert_u, price_E[expert_u] + above_u + step
        held_s = torch.nonzero(expert_t >= 0).flatten()
        held_s = held_s[torch.sort(bid_t[held_s], descending=True, stable=True).indices]
        held_s = held_s[torch.sort(expert_t[held_s], stable=True).indices]
        by_s = expert_t[held_s]
        counts_E = torch.bincount(by_s, minlength=experts)
        start_E = torch.cumsum(counts_E, 0) - counts_E
        place_s = torch.arange(len(held_s), device=device) - start_E[by_s]
        expert_t[held_s[place_s >= capacity_E[by_s]]] = -1
        full_E = (counts_E >= capacity_E) & (capacity_E > 0)
        price_E[full_E] = bid_t[held_s[(start_E + capacity_E - 1)[full_E]]]
    return expert_t


def capped_plan(gain_Et: Tensor, per_expert: int, cap: float, smooth: float = 1e-3, sweeps: int = 100) -> Tensor:
    """A [E, t] that maximises <gain, A> + smooth * H(A): rows sum to `per_expert`, columns to at most `cap`, 0 <= A <= 1.

    Dykstra's projections on smooth * log A; the two inequality sets carry corrections, the row sums need none. They are
    steps of a dual ascent, whose state any other smoothing may go on from: the first half of the sweeps comes down to
    `smooth` from 0.1, which takes 100 sweeps as far as thousands at `smooth` alone. Detached.
    """
    plan_Et = gain_Et.detach().double()
    cap_fix_t, one_fix_Et = torch.zeros_like(plan_Et[0]), torch.zeros_like(plan_Et)
    for sweep in range(sweeps):
        now = smooth * (max(0.1, smooth) / smooth) ** max(0.0, 1 - 2 * sweep / sweeps)
        before_Et = plan_Et + cap_fix_t
        cap_fix_t = (now * ((before_Et / now).logsumexp(0) - math.log(cap))).clamp(min=0)
        plan_Et = before_Et - cap_fix_t
        before_Et = plan_Et + one_fix_Et
        plan_Et = before_Et.clamp(max=0)
        one_fix_Et = before_Et - plan_Et
        plan_Et = plan_Et - now * ((plan_Et / now).logsumexp(1, keepdim=True) - math.log(per_expert))
    return (plan_Et / smooth).exp().to(gain_Et.dtype)
