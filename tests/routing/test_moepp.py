"""Cards: routing.md and layers-and-balancing.md, "MoE++": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.moepp import MoEPlusPlusLoad
from moesaic.core.context import RoutingContext
from moesaic.core.errors import MissingNeed
from moesaic.core.routing import Routing
from moesaic.experts.zero_computation import ZeroComputation
from moesaic.layers.moe import MoE
from moesaic.routing.moepp import MoEPlusPlus
from moesaic.routing.topk import TopK

CTX = RoutingContext(threads_state=True)


def test_no_residual_and_no_cheap_experts_is_the_plain_router():
    x = torch.randn(40, 16)
    mine, plain = MoEPlusPlus(16, 8, zero_computation=0, zeros=0), TopK(16, 8)
    plain.score.weight.data.copy_(mine.score.weight.data)
    a, b = mine(x, CTX.replace(previous=torch.randn(40, 8))), plain(x, RoutingContext())
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def forced(kind: str, x):
    """Output of a layer of 5 FFNs, constant, copy, zero whose residual logits force one kind."""
    moe = MoE(16, 8, "moepp", router_options={"k": 1})
    with torch.no_grad():
        moe.router.score.weight.zero_()
        moe.router.residual_weight.copy_(torch.eye(8))
    previous = torch.full((x.shape[0], 8), -30.0)
    previous[:, {"constant": 5, "copy": 6, "zero": 7}[kind]] = 30.0
    return moe(x, CTX.replace(previous=previous))[0]


def test_copy_returns_x_zero_returns_zero():
    x = torch.randn(12, 16)
    torch.testing.assert_close(forced("copy", x), x)
    zero = forced("zero", x)
    assert torch.equal(zero, torch.zeros_like(x))


def test_constant_interpolates_between_copy_and_its_vector():
    bank = ZeroComputation(16, 8)
    x, offsets = torch.randn(4, 16), torch.tensor([0, 0, 0, 0, 0, 0, 4, 4, 4])
    with torch.no_grad():
        bank.mix_C2D[0, 0] = 1e3 * x[0]
        bank.mix_C2D[0, 1] = -1e3 * x[0]
    torch.testing.assert_close(bank(x, offsets)[0], x[0])
    with torch.no_grad():
        bank.mix_C2D.mul_(-1)
        bank.vector_CD.zero_()
    torch.testing.assert_close(bank(x, offsets)[0], torch.zeros(16), atol=1e-5, rtol=0)


def test_capacities():
    router = MoEPlusPlus(16, 20, zero_computation=4)
    total = router.capacities_E(1000, 1.1).sum().item()
    assert total == pytest.approx(1.1 * 2 * 1000, rel=1e-5)
    router.tau = 1.0
    assert router.capacities_E(1000, 1.1).unique().numel() == 1


def test_capacity_drops_by_class():
    router = MoEPlusPlus(16, 8, capacity_factor=0.5)
    routing = router(torch.randn(400, 16), CTX.replace(mode="train"))
    limits = router.capacities_E(400, 0.5).ceil()
    kept = torch.bincount(routing.experts_TK[routing.experts_TK >= 0], minlength=8)
    assert (kept <= limits).all() and routing.dropped_TK.any()


def test_eta_scales_the_gradient_of_cheap_experts():
    probs = torch.full((8, 4), 0.25, requires_grad=True)
    ids = torch.arange(8).view(8, 1) % 4
    routing = Routing(torch.zeros(8, 4), probs, ids, torch.ones(8, 1))
    MoEPlusPlusLoad(cheap=2, tau=0.75).loss(routing, Scope()).backward()
    torch.testing.assert_close(probs.grad[:, 2:], 0.75 * probs.grad[:, :2])


def test_permuting_ffn_experts_with_router_and_residual_changes_nothing():
    moe = MoE(16, 8, "moepp")
    torch.nn.init.normal_(moe.router.residual_weight)
    x, previous = torch.randn(30, 16), torch.randn(30, 8)
    y, a = moe(x, CTX.replace(previous=previous))
    order = torch.cat([torch.randperm(5), torch.arange(5, 8)])
    with torch.no_grad():
        moe.router.score.weight.copy_(moe.router.score.weight[order].clone())
        moe.router.residual_weight.copy_(moe.router.residual_weight[order][:, order].clone())
        for p in moe.bank.ffn.parameters():
            p.copy_(p[order[:5]].clone())
    z, b = moe(x, CTX.replace(previous=previous[:, order]))
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.state[:, order], b.state)


def test_logits_are_affine_in_the_previous_ones_and_gradients_flow():
    router = MoEPlusPlus(16, 8)
    torch.nn.init.normal_(router.residual_weight)
    x = torch.randn(6, 16)
    g0, g1 = torch.randn(6, 8), torch.randn(6, 8)
    f = lambda g: router(x, CTX.replace(previous=g)).state  # noqa: E731
    torch.testing.assert_close(f(0.3 * g0 + 0.7 * g1), 0.3 * f(g0) + 0.7 * f(g1), rtol=1e-4, atol=1e-4)
    g0.requires_grad_()
    f(g0).sum().backward()
    assert g0.grad.abs().sum() > 0


def test_a_host_without_state_is_refused_by_name():
    with pytest.raises(MissingNeed, match="previous"):
        MoE(16, 8, "moepp", host={"token_ids"})
    with pytest.raises(MissingNeed, match="previous"):
        MoEPlusPlus(16, 8)(torch.randn(2, 16), RoutingContext())


def test_flops_fall_with_tau():
    def ffn_share(tau):
        router = MoEPlusPlus(16, 20, zero_computation=4, tau=tau)
        capacities = router.capacities_E(1000, 1.0)
        return (capacities[:16].sum() / capacities.sum()).item()

    shares = [ffn_share(t) for t in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert shares == sorted(shares)
