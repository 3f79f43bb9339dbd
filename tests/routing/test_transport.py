"""Card: routing.md, "Sparsity-Constrained Optimal Transport": the solvers, against brute force and each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from moesaic.routing.transport import balanced_assignment, capped_plan, sinkhorn, sinkhorn_in_logs, sparse_plan, sparse_simplex


def best_assignment(scores):
    """The largest sum over every way to give each expert its share, by trying them all."""
    tokens, experts = scores.shape
    sizes = [tokens // experts + (e < tokens % experts) for e in range(experts)]
    slots = [e for e, size in enumerate(sizes) for _ in range(size)]
    return max(sum(scores[t, e].item() for t, e in enumerate(order)) for order in set(itertools.permutations(slots)))


@pytest.mark.parametrize(("tokens", "experts"), [(8, 2), (6, 3), (7, 3), (4, 4), (2, 4), (5, 1)])
def test_assignment_equals_brute_force(tokens, experts):
    for _ in range(5):
        scores = torch.randn(tokens, experts)
        chosen = balanced_assignment(scores, precision=1e-4)
        got = scores.gather(1, chosen[:, None]).sum().item()
        assert got == pytest.approx(best_assignment(scores), abs=tokens * 1e-3)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 8), (63, 8), (1000, 7), (512, 64)])
def test_every_expert_gets_its_share_whatever_the_scores(tokens, experts):
    for scores in (torch.randn(tokens, experts), torch.zeros(tokens, experts), torch.eye(experts)[:1].expand(tokens, -1)):
        counts = torch.bincount(balanced_assignment(scores), minlength=experts)
        assert counts.sum() == tokens and counts.max() - counts.min() <= 1


def test_sinkhorn_s_marginals_and_its_limit():
    logits = torch.randn(24, 4)
    plan = sinkhorn(logits, iterations=200)
    torch.testing.assert_close(plan.sum(1), torch.ones(24))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 6.0), rtol=1e-4, atol=1e-4)
    sharp = sinkhorn(logits.double(), epsilon=0.01, iterations=5000)
    wanted = logits.gather(1, balanced_assignment(logits, 1e-4)[:, None]).sum()
    assert (sharp * logits).sum().item() == pytest.approx(wanted.item(), abs=0.05)
    soft = sinkhorn(logits, epsilon=5.0)
    assert (soft * logits).sum() < (plan * logits).sum() < (sharp * logits).sum()


def test_sparse_simplex_projects_and_keeps_k():
    x = torch.randn(40, 12)
    for k in (1, 3, 12):
        p = sparse_simplex(x, k)
        torch.testing.assert_close(p.sum(1), torch.ones(40))
        assert (p >= 0).all() and ((p > 0).sum(1) <= k).all()
        assert (p.gather(1, x.argmax(1, keepdim=True)) > 0).all()
    p = sparse_simplex(x, 12)
    for _ in range(50):  # no other point of the simplex is closer
        q = torch.rand(40, 12)
        assert ((x - p).square().sum(1) <= (x - q / q.sum(1, keepdim=True)).square().sum(1) + 1e-5).all()


def test_plan_rows_are_exact_for_any_alpha_and_k_counts():
    gain = torch.rand(30, 6)
    for k, steps in itertools.product((1, 2, 6), (0, 1, 20)):
        plan = sparse_plan(gain, torch.full((6,), 5.0), 1.0, k, steps=steps)
        torch.testing.assert_close(plan.sum(1), torch.ones(30))
        assert ((plan > 0).sum(1) <= k).all()


def test_large_k_is_quadratically_regularised_transport():
    gain, rows, columns = torch.rand(12, 4).double(), 1.0, torch.full((4,), 3.0).double()
    plan = sparse_plan(gain, columns, rows, 4, gamma=0.5, steps=4000, rate=0.003)
    want, fix = gain / 0.5, [torch.zeros(12, 4).double(), torch.zeros(12, 4).double()]
    for _ in range(3000):  # Dykstra: the nearest point to gain / gamma in the transport polytope
        before = want + fix[0]
        want = sparse_simplex(before, 4)
        fix[0] = before - want
        before = want + fix[1]
        want = (3 * sparse_simplex(before.T / 3, 12)).T
        fix[1] = before - want
    torch.testing.assert_close(plan, want, atol=5e-3, rtol=0)


def test_the_gain_falls_as_k_grows():
    gain = torch.rand(64, 8)
    gains = [(sparse_plan(gain, torch.full((8,), 8.0), 1.0, k, steps=500) * gain).sum().item() for k in (1, 2, 4, 8)]
    assert gains == sorted(gains, reverse=True)


def test_few_entries_cannot_meet_every_column():
    plan = sparse_plan(torch.rand(3, 8), torch.full((8,), 3 / 8), 1.0, 2, steps=500)
    assert (plan.sum(0) == 0).any(), "3 rows of 2 entries reach 6 of 8 columns"


def test_capped_plan_meets_its_limits_and_is_near_the_best():
    gain = torch.randn(6, 30).softmax(0)
    plan = capped_plan(gain, 10, 3, sweeps=1000)
    torch.testing.assert_close(plan.sum(1), torch.full((6,), 10.0), atol=1e-3, rtol=0)
    assert plan.max() < 1.01 and plan.sum(0).max() < 3.03
    free = gain.topk(10, dim=1).values.sum()
    loose = capped_plan(gain, 10, 6, sweeps=1000)
    assert (loose * gain).sum().item() == pytest.approx(free.item(), abs=0.05), "a cap of E binds nothing"
    assert (plan * gain).sum() <= free + 1e-3


@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (63, 4), (200, 64), (5, 1)])
@pytest.mark.parametrize(("spread", "epsilon"), [(1.0, 1.0), (3.0, 0.5), (1.0, 0.01), (100.0, 1.0)])
def test_sinkhorn_by_products_equals_the_one_in_logs(tokens, experts, spread, epsilon):
    """Narrow and wide logits (which take the logs themselves), with gradients."""
    logits = (spread * torch.randn(tokens, experts)).requires_grad_()
    fast, twin = sinkhorn(logits, epsilon), sinkhorn_in_logs(logits, epsilon)
    torch.testing.assert_close(fast, twin, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast.sum(1), torch.ones(tokens), rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(fast)
    grads = [torch.autograd.grad(plan, logits, cotangent)[0] for plan in (fast, twin)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 / epsilon)
