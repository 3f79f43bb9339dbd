"""Cards: layers-and-balancing.md, "BAM" and "OpenMoE": what must hold of the layers."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.bam import BAM
from moesaic.layers.moe import MoE
from moesaic.layers.openmoe import OpenMoE


def same(layer):
    """The layer with all experts copies of the first."""
    with torch.no_grad():
        first = layer.attention.experts[0]
        for expert in layer.attention.experts[1:]:
            own = dict(expert.named_parameters())
            for name, value in first.named_parameters():
                if name in own:
                    own[name].copy_(value)
        for p in layer.ffn.bank.parameters():
            p.copy_(p[:1].expand_as(p))
        layer.attention.score.weight.normal_()
        layer.ffn.router.score.weight.normal_()
    return layer


def branches(layer, x):
    allowed = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
    attention = layer.attention.experts[0](x, allowed)
    ffn = layer.ffn.bank(x[0], torch.tensor([0] + [x.shape[1]] * layer.ffn.bank.num_experts))
    return attention[0], ffn


@pytest.mark.parametrize("renormalised", [False, True])
def test_identical_copies_are_the_dense_attention_and_p_top_times_the_ffn(renormalised):
    layer, x = same(BAM(16, 4, renormalised=renormalised)).eval(), torch.randn(1, 11, 16)
    y, routing = layer(x)
    attention, ffn = branches(layer, x)
    top = routing.probs_TE.amax(1, keepdim=True)
    torch.testing.assert_close(y[0], attention + (ffn if renormalised else top * ffn), rtol=1e-4, atol=1e-5)


def test_shared_keys_and_values_equal_kv_experts_when_those_are_equal():
    full, shared = same(BAM(16, 4)).eval(), BAM(16, 4, shared_kv=True).eval()
    with torch.no_grad():
        for expert in full.attention.experts:
            expert.query.weight.normal_()
            expert.out.weight.normal_()
    shared.load_state_dict({k: v for k, v in full.state_dict().items() if k in shared.state_dict()})
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(shared(x)[0], full(x)[0])
    assert len(shared.state_dict()) == len(full.state_dict()) - 6


def test_a_one_hot_gate_is_that_specialist():
    layer, x = BAM(16, 4).eval(), torch.randn(1, 9, 16)
    gate = torch.eye(4)[2].expand(1, 9, 4)
    allowed = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    torch.testing.assert_close(layer.attention(x, gate, allowed), layer.attention.experts[2](x, allowed))


def test_every_expert_attends_softly_and_both_routings_are_shown():
    layer = BAM(16, 4).train()
    routing = layer(torch.randn(2, 9, 16), RoutingContext(mode="train"))[1]
    soft, top1 = routing.passes
    assert soft.experts_TK.shape == (18, 4) and top1.experts_TK.shape == (18, 1)
    torch.testing.assert_close(soft.weights_TK.sum(1), torch.ones(18))
    assert set(routing.aux) == {"loss/switch", "loss/z"}
    both = BAM(16, 4, causal=False).eval()
    x = torch.randn(1, 9, 16)
    later = x.clone()
    later[:, 8] += 1
    assert not torch.allclose(both(x)[0][:, 0], both(later)[0][:, 0])
    with pytest.raises(BadInput, match="even head width"):
        BAM(12, 4, heads=4)


def test_openmoe_adds_the_dense_branch_and_its_losses():
    layer = OpenMoE(16, 8, dense_width=40).train()
    plain = MoE(16, 8, layer.router, layer.bank)
    x = torch.randn(10, 16)
    y, routing = layer(x)
    torch.testing.assert_close(y, plain(x)[0] + layer.shared(x))
    torch.testing.assert_close(routing.weights_TK, routing.probs_TE.gather(1, routing.experts_TK))
    assert set(routing.aux) == {"loss/switch", "loss/z"}
    assert layer.shared.down_DI.shape == (16, 40)
