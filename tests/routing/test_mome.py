"""Card: routing.md, "MoME": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.sequence import Sequence
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.mome import MoME, pool


def adapters(**options):
    return MoE(16, 8, "mome", bank_options={"act": "gelu", "zero_start": True, "width": 1}, **options)


def test_it_starts_as_the_frozen_model_and_learns_from_there():
    moe, x = adapters().train(), torch.randn(30, 16)
    y = moe(x)[0]
    assert (y == 0).all()
    (y - 1).square().sum().backward()
    assert moe.bank.up_EDI.grad.abs().sum() > 0, "a bottleneck of one is enough to learn"


def test_equal_vectors_route_equally_at_any_scale():
    router, x = MoME(16, 8), torch.randn(1, 6, 16).repeat_interleave(4, dim=1)
    fine, coarse = (router(v.flatten(0, 1), RoutingContext()) for v in (x, pool(x, 4)))
    assert torch.equal(fine.experts_TK[::4], coarse.experts_TK)
    torch.testing.assert_close(fine.weights_TK[::4], coarse.weights_TK)


def test_all_experts_are_the_dense_mixture():
    moe, x = MoE(16, 4, "mome", router_options={"k": 4}), torch.randn(10, 16)
    with torch.no_grad():
        moe.bank.up_EDI.normal_()
    y, routing = moe(x)
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [10] * (4 - e))) for e in range(4)]
    p = routing.logits_TE.softmax(-1)
    torch.testing.assert_close(y, sum(p[:, e : e + 1] * each[e] for e in range(4)), rtol=1e-4, atol=1e-5)


def test_pool_is_a_mean_also_of_a_short_end():
    x = torch.randn(2, 7, 5)
    got = pool(x, 3)
    torch.testing.assert_close(got, torch.stack([x[:, :3].mean(1), x[:, 3:6].mean(1), x[:, 6]], 1))
    assert torch.equal(pool(x, 1), x) and pool(x, 9).shape == (2, 1, 5)
    with pytest.raises(BadInput, match="rate=0"):
        pool(x, 0)


def test_the_loss_does_not_depend_on_the_order_of_scales_nor_on_the_finest_alone():
    router, x = MoME(16, 8), torch.randn(1, 24, 16)
    scales = [pool(x, rate)[0] for rate in (1, 2, 4)]

    def loss(parts):
        ids = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])
        return Sequence().loss(router(torch.cat(parts), RoutingContext(sequence_ids=ids)), Scope(sequence_ids=ids))

    torch.testing.assert_close(loss(scales), loss(scales[::-1]))
    torch.testing.assert_close(loss(scales), torch.stack([loss([s]) for s in scales]).mean())


def test_the_adapter_bank_names_its_activations():
    x = torch.randn(5, 16)
    moe = MoE(16, 1, "mome", router_options={"k": 1}, bank_options={"act": "gelu", "std": 1.0})
    bank = moe.bank
    want = torch.nn.functional.gelu(x @ bank.down_EID[0].T) @ bank.up_EDI[0].T
    torch.testing.assert_close(moe(x)[0], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match="act='relu'"):
        MoE(16, 8, "mome", bank_options={"act": "relu"})
