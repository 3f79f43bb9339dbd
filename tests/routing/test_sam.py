"""Card: routing.md, "SAM": what must hold, of router and loss."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.sam import SamLoad
from moesaic.balancing.switch import Switch
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.sam import Sam
from moesaic.routing.topk import TopK

CTX = RoutingContext()


def test_all_experts_of_a_token_lie_in_one_group():
    router = Sam(16, 24, groups=4, k=3)
    routing = router(torch.randn(200, 16), CTX)
    group_TK = routing.experts_TK // 6
    assert (group_TK == group_TK[:, :1]).all(), "bytes sent do not depend on k"
    assert len(group_TK.unique()) == 4
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(200))
    torch.testing.assert_close(routing.weights_TK, routing.probs_TE.gather(1, routing.experts_TK))
    scaled = Sam(16, 24, groups=4, k=3, scale=4.0)
    scaled.load_state_dict(router.state_dict())
    x = torch.randn(5, 16)
    torch.testing.assert_close(scaled(x, CTX).weights_TK, 4 * router(x, CTX).weights_TK)


@pytest.mark.parametrize(("groups", "k"), [(1, 3), (8, 1)])
def test_one_group_is_top_k_and_groups_of_one_are_switch(groups, k):
    sam, plain = Sam(16, 8, groups, k), TopK(16, 8, k, convention="softmax")
    plain.score.weight.data.copy_((sam.score if groups == 1 else sam.group_score).weight.data)
    x = torch.randn(40, 16)
    a, b = sam(x, CTX), plain(x, CTX)
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)
    if groups == 1:
        inner = SamLoad(groups=1).loss(a, Scope()) - 1
        torch.testing.assert_close(inner, Switch().loss(b, Scope()))


def test_both_routers_get_a_gradient():
    sam = Sam(16, 8, 4, 2, renormalise=True)
    w = sam(torch.randn(30, 16), CTX).weights_TK
    for g in torch.autograd.grad((w * torch.randn_like(w)).sum(), [sam.score.weight, sam.group_score.weight]):
        assert g.abs().sum() > 0


def test_losses_are_one_at_each_level_at_balance_and_rise_without_it():
    sam = Sam(16, 8, 4, 2)
    with torch.no_grad():
        sam.score.weight.zero_()
        sam.group_score.weight.zero_()
    loss = SamLoad().bind(sam)
    torch.testing.assert_close(loss.loss(sam(torch.randn(40, 16), CTX), Scope()), torch.tensor(2.0))
    with torch.no_grad():
        sam.group_score.weight[2] = 1
    x = torch.randn(40, 16).abs()
    routing = sam(x, CTX)
    assert (routing.experts_TK // 2 == 2).all()
    assert loss.loss(routing, Scope()) > 4.5, "a collapsed switch costs G"
    (grad,) = torch.autograd.grad(loss.loss(routing, Scope()), sam.group_score.weight)
    assert grad[2].sum() > 0
    mask = torch.arange(40) < 20
    part = loss.loss(sam(x[:20], CTX), Scope())
    torch.testing.assert_close(loss.loss(sam(x, RoutingContext(mask=mask)), Scope(mask)), part)


def test_alignment_draws_the_switch_to_the_best_experts():
    sam = Sam(16, 8, 4, 2)
    x = torch.randn(100, 16)
    optimizer = torch.optim.Adam([sam.group_score.weight], 0.05)
    with torch.no_grad():
        sam.score.weight.mul_(50)

    def agree():
        routing = sam(x, CTX)
        best = routing.logits_TE.softmax(-1).view(-1, 4, 2).sum(-1).argmax(1)
        return (routing.experts_TK[:, 0] // 2 == best).float().mean().item()

    before = agree()
    for _ in range(100):
        loss = SamLoad(groups=4, align=10.0).loss(sam(x, CTX), Scope())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agree() > before + 0.3


def test_a_hash_may_switch():
    moe = MoE(16, 8, "sam", router_options={"groups": 4, "k": 2, "switch": "hash"}, host={"token_ids"})
    ids = torch.arange(30)
    routing = moe(torch.randn(30, 16), RoutingContext(token_ids=ids))[1]
    assert torch.equal(routing.experts_TK[:, 0] // 2, ids % 4)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(30))
    with pytest.raises(MissingNeed, match="token_ids"):
        MoE(16, 8, "sam", router_options={"switch": "hash"}, host=set())


@pytest.mark.parametrize(
    ("options", "says"), [({"groups": 3}, "does not divide"), ({"groups": 4, "k": 3}, "a group has 2"), ({"switch": "x"}, "x")]
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises(BadInput, match=says):
        Sam(16, 8, **options)
