"""Maestro's factors: ordered ranks, empty ones cut, budgets kept."""

import pytest
import torch

from moesaic.experts.maestro import Factors, RankSampler
from moesaic.surgery.compress.maestro import EPS, ROUNDS, MaestroRanks, share_out, train
from moesaic.surgery.factored import upright
from moesaic.surgery.memory import measure


def rotated(factors, seed=0):
    """The same product, its ranks mixed."""
    turn = torch.linalg.qr(torch.randn(factors.rank, factors.rank, generator=torch.Generator().manual_seed(seed)))[0]
    factors.u_OR.data, factors.v_RI.data = factors.u_OR.data @ turn, turn.T @ factors.v_RI.data
    return factors


def test_at_the_start_it_is_the_matrix():
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    factors = Factors(weight)
    torch.testing.assert_close(factors.u_OR @ factors.v_RI, weight, rtol=1e-4, atol=1e-5)


def test_full_ranks_without_the_lasso_are_ordinary_factored_training(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    target, start = torch.randn(10, 7, generator=generator), torch.randn(10, 7, generator=generator)
    factors = Factors(start)
    u_OR, v_RI = (p.detach().clone().requires_grad_() for p in (factors.u_OR, factors.v_RI))
    monkeypatch.setattr(RankSampler, "draw", lambda self: (self.factors[0], self.factors[0].rank))
    train(factors, target, 12, 0.0, 1e-2)
    for _ in range(ROUNDS):
        optimiser = torch.optim.Adam([u_OR, v_RI], lr=1e-2, eps=EPS)
        for _ in range(3):
            optimiser.zero_grad()
            ((u_OR @ v_RI - target).square().sum() / target.square().sum()).backward()
            optimiser.step()
    torch.testing.assert_close(factors.u_OR, u_OR, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factors.v_RI, v_RI, rtol=1e-5, atol=1e-6)
    assert float((factors.u_OR - Factors(start).u_OR).detach().abs().max()) > 0.05


def test_the_lasso_is_over_suffixes_not_columns():
    factors = Factors(torch.randn(6, 5, generator=torch.Generator().manual_seed(4)))
    u_OR, v_RI = factors.u_OR.detach(), factors.v_RI.detach()
    want = sum(float(u_OR[:, b:].norm() + v_RI[b:].norm()) for b in range(5))
    assert float(factors.lasso().detach()) == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_sampled_ranks_learn_the_singular_order():
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (16, 10))
    target = (u * torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0, 0.5])) @ v.T

    def first(factors, rank):  # how much of the best rank-r error is reached by the first r ranks
        off = (target - factors.u_OR[:, :rank] @ factors.v_RI[:rank]).norm()
        return float(off.detach() / torch.linalg.svdvals(target)[rank:].norm())

    mixed = rotated(Factors(target))
    before = [first(mixed, rank) for rank in (1, 2, 4)]
    train(mixed, target, 1500, 0.0, 0.03)
    after = [first(mixed, rank) for rank in (1, 2, 4)]
    assert min(before) > 1.3 and max(after) < 1.15


@pytest.mark.slow
def test_a_low_rank_target_is_found_and_suffix_norms_fall():
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(24, 5, generator=generator) @ torch.randn(5, 16, generator=generator)
    factors = Factors(target + 0.01 * torch.randn(24, 16, generator=generator))
    ranks = [factors.rank]
    for number in range(2):
        train(factors, target, 400, 0.5, 0.01, number)
        ranks.append(factors.rank)
    u_R, v_R = factors.suffixes()
    assert bool((u_R.diff() <= 0).all()) and bool((v_R.diff() <= 0).all())
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == 5
    off = float((factors.u_OR @ factors.v_RI - target).norm() / target.norm())
    assert off < 0.1


def test_cutting_an_empty_rank_changes_nothing_and_the_budget_is_met(make, ids):
    factors = Factors(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    factors.u_OR.data[:, 4:] = 0
    before = (factors.u_OR @ factors.v_RI).detach()
    assert factors.shrink() == 4
    torch.testing.assert_close((factors.u_OR @ factors.v_RI).detach(), before)
    assert sum(share_out([factors, Factors(torch.eye(6) * 0.01)], 5, 100)) == 5
    assert share_out([factors, Factors(torch.eye(6) * 1e-4)], 4, 100) == [4, 0]
    layer = measure(make("Qwen3Moe"), ids, "R0,R2")[0]
    change = MaestroRanks(0.5, steps=4).change(layer, None)
    assert change.report["share"] <= 0.5 and len(change.form["first"]["ranks"]) == 8
    assert upright(layer, 0, "first").shape == (32, 32)
