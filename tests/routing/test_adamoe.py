"""Card: routing.md, "AdaMoE": what must hold."""

from __future__ import annotations

import torch

from moesaic.balancing.adamoe import AdaMoELoad
from moesaic.balancing.balancer import Scope
from moesaic.core.context import RoutingContext
from moesaic.layers.moe import MoE
from moesaic.routing.adamoe import AdaMoE
from moesaic.routing.topk import TopK

CTX = RoutingContext()


def with_logits(logits_TE, true, nulls, k):
    router = AdaMoE(true + nulls, true, k=k, nulls=nulls)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(true + nulls))
    return router(logits_TE, CTX)


def test_no_nulls_is_renormalised_top_k():
    x = torch.randn(40, 16)
    ada, plain = AdaMoE(16, 8, k=3, nulls=0), TopK(16, 8, k=3)
    plain.score.weight.data.copy_(ada.score.weight.data)
    a, b = ada(x, CTX), plain(x, CTX)
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_weights_renormalise_over_true_choices_and_a_constant_changes_nothing():
    logits = torch.randn(60, 12)
    routing = with_logits(logits, 8, 4, 4)
    sums = routing.weights_TK.sum(1)
    has_true = (routing.experts_TK >= 0).any(1)
    torch.testing.assert_close(sums[has_true], torch.ones(int(has_true.sum())))
    shifted = with_logits(logits + 7.0, 8, 4, 4)
    torch.testing.assert_close(shifted.weights_TK, routing.weights_TK, rtol=1e-4, atol=1e-6)


def test_all_null_is_exactly_zero_and_finite():
    moe = MoE(12, 8, "adamoe", router_options={"k": 4, "nulls": 4})
    with torch.no_grad():
        moe.router.score.weight.copy_(torch.eye(12))
    x = torch.zeros(3, 12)
    x[:, 8:] = 50.0
    x.requires_grad_()
    y, routing = moe(x)
    assert (routing.experts_TK == -1).all()
    assert torch.equal(y, torch.zeros_like(y))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_permuting_nulls_changes_neither_output_nor_loss():
    logits = torch.randn(60, 12)
    order = torch.cat([torch.arange(8), 8 + torch.randperm(4)])
    a, b = with_logits(logits, 8, 4, 4), with_logits(logits[:, order], 8, 4, 4)
    dense = [torch.zeros(60, 8) for _ in range(2)]
    for routing, out in zip((a, b), dense, strict=True):
        out.scatter_add_(1, routing.experts_TK.clamp(min=0), routing.weights_TK)
    torch.testing.assert_close(dense[0], dense[1])
    loss = AdaMoELoad(true_experts=8)
    torch.testing.assert_close(loss.loss(a, Scope()), loss.loss(b, Scope()))


def test_mean_true_count_at_balance():
    routing = with_logits(torch.rand(20000, 16), 8, 8, 4)
    true = (routing.experts_TK >= 0).sum(1).float().mean().item()
    assert abs(true - 4 * 8 / 16) < 0.05


def test_retrofit_starts_nulls_at_the_mean_row():
    router = AdaMoE(16, 8, k=4, nulls=4)
    trained = torch.randn(8, 16)
    router.extend(trained)
    assert torch.equal(router.score.weight[:8], trained)
    torch.testing.assert_close(router.score.weight[8:], trained.mean(0).expand(4, -1))
