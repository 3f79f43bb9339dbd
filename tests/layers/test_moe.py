"""The layer that joins router, bank, shared experts and balancers."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.balancing.switch import Switch
from moesaic.core.errors import BadInput, UnknownMethod
from moesaic.experts.shared import SharedExperts
from moesaic.layers.moe import MoE


def test_batched_input_keeps_its_shape_and_empty_batches_work():
    moe = MoE(16, 4)
    x = torch.randn(2, 3, 16)
    y, routing = moe(x)
    assert y.shape == x.shape and routing.tokens == 6
    torch.testing.assert_close(y.view(6, 16), moe(x.view(6, 16))[0])
    assert moe(torch.zeros(0, 16))[0].shape == (0, 16)


def test_losses_in_training_only_each_with_its_coefficient():
    moe = MoE(16, 4, balance={"switch": 0.5, "z": 0.25})
    x = torch.randn(10, 16)
    _, routing = moe.train()(x)
    p, f = routing.probs_TE.mean(0), routing.counts_E() / 20
    torch.testing.assert_close(routing.aux["loss/switch"], 0.5 * 4 * (f * p).sum())
    torch.testing.assert_close(routing.aux["loss/z"], 0.25 * routing.logits_TE.logsumexp(-1).square().mean())
    assert not moe.eval()(x)[1].aux
    assert list(MoE(16, 4, balance=[Switch(0.1)]).train()(x)[1].aux) == ["loss/switch"]


def test_shared_experts_are_added_and_stay_out_of_the_loss():
    torch.manual_seed(0)
    plain = MoE(16, 4, balance={"switch": 1.0}).train()
    torch.manual_seed(0)
    both = MoE(16, 4, shared=SharedExperts(16, 8), balance={"switch": 1.0}).train()
    both.router.load_state_dict(plain.router.state_dict())
    both.bank.load_state_dict(plain.bank.state_dict())
    x = torch.randn(10, 16)
    (y, a), (z, b) = plain(x), both(x)
    torch.testing.assert_close(z, y + both.shared(x))
    torch.testing.assert_close(a.aux["loss/switch"], b.aux["loss/switch"])


def test_balance_loss_lowers_the_variation_of_the_load():
    def spread(coefficient):
        torch.manual_seed(0)
        moe = MoE(16, 8, balance={"switch": coefficient} if coefficient else {}).train()
        x = torch.randn(400, 16) + torch.randn(16)  # a common direction makes a few experts popular
        optimizer = torch.optim.Adam(moe.router.parameters(), lr=3e-3)
        for _ in range(200):
            _, routing = moe(x)
            loss = sum(routing.aux.values(), 0.0 * routing.logits_TE.sum())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        counts = routing.counts_E()
        return (counts.std() / counts.mean()).item()

    assert spread(1.0) < 0.5 * spread(0.0)


def test_unknown_parts_and_public_names():
    assert moesaic.MoE is MoE
    with pytest.raises(UnknownMethod, match="no routing method 'topj'"):
        MoE(16, 4, "topj")
    with pytest.raises(UnknownMethod, match="no balancing method 'sw'"):
        MoE(16, 4, balance={"sw": 1.0})
    with pytest.raises(BadInput, match="k=5 experts per token"):
        MoE(16, 4, router_options={"k": 5})


def test_torch_compile_and_autocast_run():
    moe = MoE(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(torch.randn(9, 16))
    assert routing.logits_TE.dtype == torch.float32
    assert y.isfinite().all()
