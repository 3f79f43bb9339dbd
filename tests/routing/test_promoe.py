"""Card: routing.md, "Routing Matters in MoE (ProMoE)": router and contrastive loss."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.promoe import PrototypeContrast
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.experts.shared import SharedExperts
from moesaic.layers.moe import MoE
from moesaic.routing.promoe import ProMoE

LOSS = PrototypeContrast()


def ctx(classes, mode="train", **kw):
    return RoutingContext(mode=mode, class_ids=torch.as_tensor(classes), **kw)


def test_weights_are_cosines_that_no_scale_changes():
    router, x = ProMoE(16, 6, k=2), torch.randn(30, 16)
    some = ctx([3] * 30)
    routing = router(x, some)
    cos = torch.nn.functional.cosine_similarity(x[:, None], router.prototype_ED[None], dim=-1)
    torch.testing.assert_close(routing.weights_TK, cos.topk(2).values)
    assert routing.weights_TK.min() < 0, "an expert may be subtracted"
    torch.testing.assert_close(router(5 * x, some).weights_TK, routing.weights_TK)
    with torch.no_grad():
        router.prototype_ED[1] *= 7
    torch.testing.assert_close(router(x, some).weights_TK, routing.weights_TK)
    for mode, want in (("softmax", cos.softmax(-1)), ("sigmoid", cos.sigmoid())):
        other = ProMoE(16, 6, k=2, weight=mode)
        other.load_state_dict(router.state_dict())
        got = other(x, some)
        torch.testing.assert_close(got.weights_TK, want.gather(1, got.experts_TK))


def test_unconditional_rows_depend_on_the_last_and_the_shared_expert_only():
    moe = MoE(16, 6, "promoe", shared=SharedExperts(16, 8), router_options={"k": 2})
    x, classes = torch.randn(20, 16), torch.tensor([1000, 4] * 10)
    y, routing = moe(x, ctx(classes))
    null = classes == 1000
    assert (routing.experts_TK[null] == torch.tensor([5, -1])).all() and (
        routing.weights_TK[null] == torch.tensor([1.0, 0])
    ).all()
    assert (routing.experts_TK[~null] < 5).all() and (routing.experts_TK[~null] >= 0).all()
    with torch.no_grad():
        for e in range(5):
            for tensor in moe.bank.peek(e).values():
                tensor.normal_()
        moe.router.prototype_ED.normal_()
    again = moe(x, ctx(classes))[0]
    torch.testing.assert_close(again[null], y[null])
    assert not torch.allclose(again[~null], y[~null])


def test_an_all_conditional_batch_gives_the_last_expert_a_zero_gradient():
    moe = MoE(16, 6, "promoe", balance={"promoe": 1.0}).train()
    y, routing = moe(torch.randn(40, 16), ctx([7] * 40))
    (y.sum() + routing.aux["loss/promoe"]).backward()
    assert (moe.bank.down_EDI.grad[5] == 0).all() and moe.bank.down_EDI.grad[:5].abs().sum() > 0
    assert moe.router.prototype_ED.grad.isfinite().all()


def test_contrast_is_log_n_when_all_cosines_agree_and_zero_when_aligned():
    router = ProMoE(4, 5)
    with torch.no_grad():
        router.prototype_ED.copy_(torch.eye(4))
    routing = router(torch.eye(4).repeat(3, 1) * 2, ctx([1] * 12))
    assert LOSS.loss(routing, Scope()) < 1e-5
    assert PrototypeContrast(temperature=10.0).loss(routing, Scope()) > 1
    same = routing.replace(aux={**routing.aux, "token_mean_ED": torch.full((4, 4), 0.5)})
    assert LOSS.loss(same, Scope()).item() == pytest.approx(math.log(4))


def test_means_leave_out_empty_experts_padding_and_unconditional_tokens():
    router, x = ProMoE(16, 6), torch.randn(40, 16)
    mask = torch.arange(40) < 25
    classes = torch.where(torch.arange(40) % 4 == 0, 1000, 2)
    kept = mask & (classes != 1000)
    noisy = torch.where(kept[:, None], x, 9 * torch.randn(40, 16))
    a, b = (LOSS.loss(router(v, ctx(classes, mask=mask)), Scope(mask)) for v in (x, noisy))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, LOSS.loss(router(x[kept], ctx([2] * int(kept.sum()))), Scope()))
    one = router(x[:1].expand(8, -1), ctx([2] * 8))
    assert LOSS.loss(one, Scope()) == 0, "fewer than two experts have tokens"
    assert LOSS.loss(router(x, ctx(classes, mode="eval")), Scope()) == 0
    token = x.clone().requires_grad_()
    LOSS.loss(router(token, ctx(classes)), Scope()).backward()
    assert token.grad.abs().sum() > 0 and router.prototype_ED.grad.abs().sum() > 0


def test_what_cannot_be_is_refused():
    with pytest.raises(BadInput, match="one for samples without a class"):
        ProMoE(16, 4, k=4)
    with pytest.raises(BadInput, match="weight='cos'"):
        ProMoE(16, 4, weight="cos")
    with pytest.raises(MissingNeed, match="class_ids"):
        MoE(16, 4, "promoe", host=set())


def test_the_loss_makes_clusters_purer():
    """The card's experiment: tokens of 4 clusters, 4 prototypes that start at random; mean of five starts."""
    purity = {0.0: 0.0, 1.0: 0.0}
    for seed in range(5):
        for coefficient in purity:
            torch.manual_seed(seed)
            centers = 3 * torch.randn(4, 8)
            router = ProMoE(8, 5)
            optimizer = torch.optim.Adam(router.parameters(), 0.02)
            for _ in range(60):
                label = torch.randint(0, 4, (64,))
                routing = router(centers[label] + torch.randn(64, 8), ctx([0] * 64))
                optimizer.zero_grad()
                (coefficient * LOSS.loss(routing, Scope())).backward()
                optimizer.step()
            label = torch.arange(400) % 4
            chosen = router(centers[label] + torch.randn(400, 8), ctx([0] * 400)).experts_TK[:, 0]
            table = torch.zeros(4, 4).index_put((chosen, label), torch.ones(400), accumulate=True)
            purity[coefficient] += table.amax(1).sum().item() / 400 / 5
    print(purity)
    assert purity[1.0] > purity[0.0] + 0.1
