"""Card: layers-and-balancing.md, "DeepSeekMoE": what must hold of the layer."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.layers.deepseekmoe import DeepSeekMoE
from moesaic.layers.moe import MoE


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_no_slicing_and_no_sharing_is_plain_top_k_without_renormalisation():
    torch.manual_seed(0)
    deep = DeepSeekMoE(16, 8, k=2, slices=1, shared=0)
    torch.manual_seed(0)
    plain = MoE(16, 8, router_options={"convention": "softmax"})
    x = torch.randn(9, 16)
    torch.testing.assert_close(deep(x)[0], plain(x)[0])


def test_slicing_keeps_total_and_active_parameters():
    coarse, fine = DeepSeekMoE(32, 16, 2, 64, slices=1, shared=0), DeepSeekMoE(32, 16, 2, 64, slices=4, shared=1)
    experts = lambda m: parameters(m.bank) + (parameters(m.shared) if m.shared else 0)  # noqa: E731
    assert experts(coarse) == experts(fine)
    assert (fine.router.num_experts, fine.router.k) == (63, 7)
    routing = fine(torch.randn(50, 32))[1]
    assert (routing.weights_TK.sum(1) < 1).all()


def test_losses_see_routed_experts_only():
    moe = DeepSeekMoE(32, 16, 2, 64, slices=4, shared=4, alpha=1.0, device_alpha=1.0, devices=4).train()
    routing = moe(torch.randn(50, 32))[1]
    assert set(routing.aux) == {"loss/switch", "loss/device"}
    assert routing.counts_E().numel() == 60
    assert routing.counts_E().sum() == 50 * 4


def test_refusals():
    with pytest.raises(BadInput, match="slices=3 does not divide"):
        DeepSeekMoE(32, 16, 2, 64, slices=3)
    with pytest.raises(BadInput, match="leaves none"):
        DeepSeekMoE(32, 16, 1, 64, slices=2, shared=2)
