"""Card: routing.md, "Autonomy-of-Experts": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import MissingNeed
from moesaic.experts.autonomous import Autonomous, parity_width
from moesaic.layers.moe import MoE


def layer(k=2, **options):
    return MoE(16, 6, "autonomy_of_experts", router_options={"k": k, **options})


def test_scaling_all_first_factors_keeps_the_order_and_changes_weights():
    moe, x = layer(), torch.randn(30, 16)
    a = moe(x)[1]
    moe.bank.down_ERD.data.mul_(3)
    b = moe(x)[1]
    assert torch.equal(a.experts_TK, b.experts_TK)
    assert (a.weights_TK - b.weights_TK).abs().max() > 1e-3


def test_k_equals_e_is_the_dense_weighted_sum():
    moe, x = layer(k=6), torch.randn(9, 16)
    y, routing = moe(x)
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [9] * (6 - e))) for e in range(6)]
    want = sum(routing.probs_TE[:, e : e + 1] * each[e] for e in range(6))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_permuting_experts_permutes_indices():
    moe, x, order = layer(), torch.randn(30, 16), torch.randperm(6)
    y, a = moe(x)
    for p in moe.bank.parameters():
        p.data.copy_(p.data[order].clone())
    z, b = moe(x)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    assert torch.equal(order[b.experts_TK], a.experts_TK)


def test_rotating_the_low_rank_space_changes_nothing():
    moe, x = layer(), torch.randn(30, 16)
    y, a = moe(x)
    q = torch.linalg.qr(torch.randn(moe.bank.down_ERD.shape[1], moe.bank.down_ERD.shape[1])).Q
    moe.bank.down_ERD.data = torch.einsum("rs,erd->esd", q, moe.bank.down_ERD.data)
    moe.bank.up_EIR.data = torch.einsum("eir,rs->eis", moe.bank.up_EIR.data, q)
    z, b = moe(x)
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-4)


def test_rescaling_one_expert_moves_its_rank_but_not_its_function():
    moe, x = layer(), torch.randn(30, 16)
    a = moe(x)[1]
    before = moe.bank(x, torch.tensor([0, 30, 30, 30, 30, 30, 30]))
    moe.bank.down_ERD.data[0] *= 100
    moe.bank.up_EIR.data[0] /= 100
    torch.testing.assert_close(moe.bank(x, torch.tensor([0, 30, 30, 30, 30, 30, 30])), before, rtol=1e-3, atol=1e-5)
    b = moe(x)[1]
    assert (b.experts_TK[:, 0] == 0).all() and not (a.experts_TK[:, 0] == 0).all()


def test_gradient_is_finite_at_zero_and_activations_are_reused():
    moe = layer()
    x = torch.zeros(3, 16, requires_grad=True)
    y, _ = moe(x)
    y.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in moe.parameters())
    calls = []
    original = Autonomous.forward
    moe.bank.forward = lambda *a: (calls.append(1), original(moe.bank, *a))[1]
    moe(torch.randn(4, 16))
    assert not calls, "run() must reuse the router's activations instead of computing them again"


def test_parameter_parity_with_swiglu():
    dim, width, low = 768, 1024, 256
    wide = parity_width(dim, width, low)
    mine = low * (dim + wide) + 2 * dim * wide
    assert abs(mine - 3 * dim * width) / (3 * dim * width) < 0.002


def test_a_bank_without_activations_is_refused():
    with pytest.raises(MissingNeed, match="activations"):
        MoE(16, 6, "autonomy_of_experts", bank="gated_mlp")
