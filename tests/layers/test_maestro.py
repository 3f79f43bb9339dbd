"""Card: layers-and-balancing.md, "Maestro": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.experts.maestro import Factors, Maestro, RankSampler
from moesaic.layers.maestro import MaestroLayer


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_factors_start_as_the_matrix_and_full_rank_is_the_model(shape):
    weight, x = torch.randn(shape), torch.randn(5, shape[1])
    factors = Factors(weight)
    torch.testing.assert_close(factors.u_OR @ factors.v_RI, weight, rtol=1e-4, atol=1e-5)
    full = factors(x)
    with factors.truncated(7):
        assert torch.equal(factors(x), full)
    with factors.truncated(2):
        torch.testing.assert_close(factors(x), x @ (factors.u_OR[:, :2] @ factors.v_RI[:2]).T)
    assert torch.equal(factors(x), full)
    with pytest.raises(BadInput, match="ranks 1 to 7"), factors.truncated(8):
        pass


def test_the_lasso_pulls_later_ranks_more_and_has_a_gradient_at_zero():
    factors = Factors(torch.randn(8, 8))
    with torch.no_grad():
        factors.u_OR.fill_(0.3)
    (grad,) = torch.autograd.grad(factors.lasso(), factors.u_OR)
    norms = grad.norm(dim=0)
    assert (norms.diff() > 0).all()
    with torch.no_grad():
        factors.u_OR.zero_()
    assert torch.autograd.grad(factors.lasso(), factors.u_OR)[0].isfinite().all()


def test_shrinking_an_empty_suffix_changes_nothing_and_merged_experts_agree():
    bank, x = Maestro(12, 3, 9), torch.randn(6, 12)
    with torch.no_grad():
        bank.first[1].u_OR[:, 5:] = 0
        bank.second[1].v_RI[4:] = 0
    offsets = torch.tensor([0, 0, 6, 6])
    before, cost = bank(x, offsets), bank.cost_E
    assert bank.shrink() == [9, 5, 9, 9, 4, 9]
    torch.testing.assert_close(bank(x, offsets), before, rtol=1e-4, atol=1e-5)
    assert bank.cost_E[1] < cost[1] and bank.cost_E[0] == cost[0]
    w = bank.dense(1)
    torch.testing.assert_close(torch.nn.functional.gelu(x @ w["in_ID"].T) @ w["out_DI"].T, before, rtol=1e-4, atol=1e-5)


def test_the_sampler_draws_every_pair_once_before_any_twice():
    layer = MaestroLayer(6, 2, width=4)
    sampler = RankSampler.of(layer)
    drawn = [sampler.draw() for _ in range(16)]
    assert len({(id(f), rank) for f, rank in drawn}) == 16
    x = torch.randn(9, 6)
    full = layer(x)[0]
    with sampler.step() as (factors, _):
        assert factors.used is not None
    assert torch.equal(layer(x)[0], full)
    with pytest.raises(BadInput, match="no low-rank factors"):
        RankSampler.of(torch.nn.Linear(2, 2))


def test_ordered_dropout_recovers_the_singular_value_order():
    """A linear map on isotropic data: truncation at every rank ends near the best possible error."""
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(6, 6))[0], torch.linalg.qr(torch.randn(6, 6))[0]
    singular = torch.tensor([3.0, 2.2, 1.5, 0.9, 0.4, 0.1])
    target = u @ torch.diag(singular) @ v
    factors = Factors(torch.randn(6, 6))
    sampler = RankSampler([factors])
    optimizer = torch.optim.Adam(factors.parameters(), lr=2e-2)
    for step in range(3000):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / 3000)
        with sampler.step():
            loss = (factors(torch.eye(6)).T - target).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in range(1, 7):
        with factors.truncated(rank), torch.no_grad():
            error = (factors(torch.eye(6)).T - target).norm()
        assert error < singular[rank:].norm() + 0.1


def test_the_layers_loss_scales_with_its_size():
    layer = MaestroLayer(8, 2, lam=0.1).train()
    routing = layer(torch.randn(5, 8), RoutingContext(mode="train"))[1]
    size = sum(p.numel() for p in layer.bank.parameters())
    torch.testing.assert_close(routing.aux["loss/lasso"], 0.1 * layer.bank.lasso() / size)
    assert "loss/lasso" not in layer.eval()(torch.randn(5, 8))[1].aux
