"""Card: routing.md, "SMEAR": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.experts.adapter import Adapter
from moesaic.layers.moe import MoE
from moesaic.routing.smear import Smear


def ctx(batch=3, length=5, **kw):
    return RoutingContext(sequence_ids=torch.arange(batch).repeat_interleave(length), **kw)


def filled(act="silu", experts=4):
    return Adapter(16, experts, act=act, std=0.5)


def test_one_hot_is_exactly_that_expert():
    bank, x = filled(), torch.randn(7, 16)
    merged = bank.merge(torch.eye(4)[2:3])
    assert torch.equal(merged(x, torch.tensor([0, 7])), bank(x, torch.tensor([0, 0, 0, 7, 7])))


def test_one_expert_is_the_plain_adapter():
    moe = MoE(16, 1, "smear", bank=filled(experts=1))
    x = torch.randn(15, 16)
    torch.testing.assert_close(moe(x, ctx())[0], moe.bank(x, torch.tensor([0, 15])))


@pytest.mark.parametrize("act", [None, "silu"])
def test_merging_is_mixing_outputs_only_for_linear_experts(act):
    bank, x = filled(act), torch.randn(8, 16)
    p = torch.randn(1, 4).softmax(-1)
    merged = bank.merge(p)(x, torch.tensor([0, 8]))
    each = torch.stack([bank(x, torch.tensor([0] * (e + 1) + [8] * (4 - e))) for e in range(4)])
    same = torch.allclose(merged, torch.einsum("e,etd->td", p[0], each), rtol=1e-4, atol=1e-5)
    if act:
        assert not same
    else:  # a product of two averaged factors is not the average of products: only the outer factor is linear
        bank.down_EID.data[:] = bank.down_EID.data[:1]
        merged = bank.merge(p)(x, torch.tensor([0, 8]))
        each = torch.stack([bank(x, torch.tensor([0] * (e + 1) + [8] * (4 - e))) for e in range(4)])
        torch.testing.assert_close(merged, torch.einsum("e,etd->td", p[0], each), rtol=1e-4, atol=1e-5)


def test_permuting_one_experts_hidden_units_changes_the_merge():
    bank, x, p = filled(), torch.randn(8, 16), torch.full((1, 4), 0.25)
    before, alone = bank.merge(p)(x, torch.tensor([0, 8])), bank(x, torch.tensor([0, 8, 8, 8, 8]))
    order = torch.randperm(bank.down_EID.shape[1])
    for name, axis in (("down_EID", 0), ("down_bias_EI", 0), ("up_EDI", 1)):
        tensor = getattr(bank, name).data[0]
        tensor.copy_(tensor.index_select(axis, order))
    torch.testing.assert_close(bank(x, torch.tensor([0, 8, 8, 8, 8])), alone, rtol=1e-4, atol=1e-5)
    assert (bank.merge(p)(x, torch.tensor([0, 8])) - before).abs().max() > 1e-3


def test_gradients_reach_every_expert_in_proportion():
    bank, x = filled(), torch.randn(8, 16)
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    bank.merge(p)(x, torch.tensor([0, 8])).square().sum().backward()
    grad = bank.up_EDI.grad
    for e in range(4):
        torch.testing.assert_close(grad[e], grad[3] * p[0, e] / 0.4, rtol=1e-4, atol=1e-6)


def test_one_merge_per_sequence_and_padding_stays_out():
    moe = MoE(16, 4, "smear", bank=filled())
    moe.router.vector_gain_D.data.fill_(1.0)
    x = torch.randn(15, 16)
    y, routing = moe(x, ctx())
    assert routing.merge_GE.shape == (3, 4)
    other = x.clone()
    other[5:] += 1
    torch.testing.assert_close(moe(other, ctx())[0][:5], y[:5])
    mask = torch.ones(15, dtype=torch.bool)
    mask[3:5] = False
    padded = x.clone()
    padded[3:5] = 99.0
    a, b = moe(x, ctx(mask=mask)), moe(padded, ctx(mask=mask))
    torch.testing.assert_close(a[0][:3], b[0][:3])
    assert torch.equal(a[1].merge_GE, b[1].merge_GE)


def test_expert_dropout_renormalises_in_training_only():
    router = Smear(16, 4, dropout=0.5)
    x = torch.randn(300, 16)
    train = router(x, ctx(100, 3, mode="train")).merge_GE
    assert (train < 1e-6).any()
    torch.testing.assert_close(train.sum(1), torch.ones(100))
    assert (router(x, ctx(100, 3)).merge_GE > 0.1).all()


def test_not_for_causal_hosts():
    with pytest.raises(BadInput, match="causal"):
        MoE(16, 4, "smear", causal=True)
