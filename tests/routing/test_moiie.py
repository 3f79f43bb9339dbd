"""Card: routing.md, "MoIIE": what must hold, of router and losses."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.moiie import ModalityLoad
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.moiie import MoIIE


def ctx(modality, mode="train", **kw):
    return RoutingContext(mode=mode, modality_ids=torch.as_tensor(modality), **kw)


@pytest.mark.parametrize("experts", [4, 8, 16])
def test_neither_modality_uses_the_other_s_experts(experts):
    own = experts // 4
    modality = torch.arange(200) % 2
    chosen = MoIIE(16, experts)(torch.randn(200, 16), ctx(modality)).experts_TK
    assert (chosen[modality == 1] < experts - own).all() and (chosen[modality == 0] >= own).all()
    assert len(chosen[modality == 1].unique()) == len(chosen[modality == 0].unique()) == experts - own
    shared = set(chosen[modality == 1].flatten().tolist()) & set(chosen[modality == 0].flatten().tolist())
    assert shared == set(range(own, experts - own))


def test_tied_routers_are_one_router_with_masks():
    router, x = MoIIE(16, 8), torch.randn(50, 16)
    modality = torch.arange(50) % 2
    full = torch.randn(8, 16)
    router.vision_score.weight.data.copy_(full[:6])
    router.text_score.weight.data.copy_(full[2:])
    logits = x @ full.T
    logits[modality == 1, 6:] = float("-inf")
    logits[modality == 0, :2] = float("-inf")
    routing = router(x, ctx(modality))
    torch.testing.assert_close(routing.probs_TE, logits.softmax(-1))
    want = logits.softmax(-1).topk(2).values
    torch.testing.assert_close(routing.weights_TK, want / want.sum(1, keepdim=True))


def test_equal_experts_are_the_dense_layer():
    moe, x = MoE(16, 8, "moiie"), torch.randn(20, 16)
    for e in range(8):
        moe.bank[e] = moe.bank[3]
    y = moe(x, ctx(torch.arange(20) % 2))[0]
    torch.testing.assert_close(y, moe.bank(x, torch.tensor([0] + [20] * 8)), rtol=1e-4, atol=1e-5)


def test_a_batch_without_images_trains_and_its_vision_loss_is_zero():
    moe = MoE(16, 8, "moiie", balance={"moiie": 0.001}).train()
    y, routing = moe(torch.randn(20, 16), ctx(torch.zeros(20, dtype=torch.long)))
    (y.sum() + routing.aux["loss/moiie"]).backward()
    assert (moe.router.vision_score.weight.grad == 0).all() and moe.router.text_score.weight.grad.abs().sum() > 0
    p = routing.probs_TE.mean(0)
    f = routing.counts_E() / routing.counts_E().sum()
    torch.testing.assert_close(routing.aux["loss/moiie"] / 0.001, 6 * (f * p).sum())


def test_losses_are_per_modality_and_leave_padding_out():
    router, x = MoIIE(16, 8), torch.randn(60, 16)
    modality, mask = torch.arange(60) % 2, torch.arange(60) < 40
    routing = router(x, ctx(modality, mask=mask))
    want = 0.0
    for kind in (0, 1):
        here = mask & (modality == kind)
        counts = torch.bincount(routing.experts_TK[here].flatten(), minlength=8)
        want = want + 6 * (counts / counts.sum() * routing.probs_TE[here].mean(0)).sum()
    torch.testing.assert_close(ModalityLoad().bind(router).loss(routing, Scope(mask)), want)


def test_the_last_patch_quirk_is_behind_a_flag():
    modality = torch.tensor([0, 1, 1, 1, 0, 0])
    x = torch.randn(1, 16).expand(6, -1)
    plain, quirk = MoIIE(16, 8), MoIIE(16, 8, next_decides=True)
    quirk.load_state_dict(plain.state_dict())
    as_text = plain(x, ctx([0] * 6)).experts_TK
    a, b = (r(x, ctx(modality, sequence_ids=torch.zeros(6))).experts_TK for r in (plain, quirk))
    assert not torch.equal(a[3], as_text[3]) and torch.equal(b[3], as_text[3])
    assert torch.equal(b[1:3], a[1:3]) and torch.equal(b[4:], a[4:])
    assert plain.causal and not quirk.causal
    two = torch.tensor([0, 0, 0, 1, 1, 1])  # two sequences: what follows a sequence's last patch is another one's
    images = torch.ones(6, dtype=torch.long)
    ids = quirk(x, ctx(images, sequence_ids=two)).experts_TK
    assert torch.equal(ids[2], as_text[2]) and torch.equal(ids[5], as_text[5]) and torch.equal(ids[3], a[3])
    with pytest.raises(MissingNeed, match="sequence_ids"):
        quirk(x, ctx(images))


def test_what_cannot_be_is_refused():
    for options, says in (({"own": 5}, "own=5"), ({"own": 3, "k": 6}, "5 candidates"), ({"own": -1}, "own=-1")):
        with pytest.raises(BadInput, match=says):
            MoIIE(16, 8, **options)
    with pytest.raises(MissingNeed, match="modality_ids"):
        MoE(16, 8, "moiie", host=set())
