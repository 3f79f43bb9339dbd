"""Card: routing.md, "Pangu Pro MoE (MoGE)": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.switch import Switch
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.moge import MoGE
from moesaic.routing.topk import TopK

CTX = RoutingContext()


@pytest.mark.parametrize(("groups", "per_group"), [(4, 1), (2, 3), (1, 5)])
def test_every_token_has_exactly_its_experts_in_every_group(groups, per_group):
    routing = MoGE(16, 40, groups, per_group)(torch.randn(63, 16), CTX)
    group_TK = routing.experts_TK // (40 // groups)
    for group in range(groups):
        assert ((group_TK == group).sum(1) == per_group).all()
    per_device = routing.counts_E().view(groups, -1).sum(1)
    assert per_device.tolist() == [63.0 * per_group] * groups, "the imbalance between devices is 0 by construction"
    assert all(len(set(row)) == len(row) for row in routing.experts_TK.tolist())


def test_one_group_is_plain_softmax_top_k():
    grouped, plain = MoGE(16, 8, 1, 3), TopK(16, 8, 3, convention="softmax")
    plain.score.weight.data.copy_(grouped.score.weight.data)
    x = torch.randn(40, 16)
    a, b = grouped(x, CTX), plain(x, CTX)
    assert torch.equal(a.experts_TK, b.experts_TK)
    torch.testing.assert_close(a.weights_TK, b.weights_TK)


def test_whole_groups_activate_every_expert_and_the_scale_scales():
    router = MoGE(16, 8, 4, 2)
    with torch.no_grad():
        router.scale_E.copy_(torch.arange(1.0, 9.0))
    routing = router(torch.randn(20, 16), CTX)
    assert (routing.experts_TK.sort(1).values == torch.arange(8)).all()
    want = routing.probs_TE.gather(1, routing.experts_TK) * (routing.experts_TK + 1)
    torch.testing.assert_close(routing.weights_TK, want)


def test_the_set_may_differ_from_global_top_k_and_never_holds_more_mass():
    routing = MoGE(16, 16, 4, 1)(10 * torch.randn(200, 16), CTX)
    best = routing.probs_TE.topk(4).values.sum(1)
    mass = routing.weights_TK.sum(1)
    assert (mass <= best + 1e-6).all()
    assert (mass < best - 1e-6).any()


def test_the_load_loss_reads_the_selection_inside_groups():
    router = MoGE(16, 8, 4, 1)
    routing = router(torch.randn(60, 16), CTX)
    f = torch.bincount(routing.experts_TK.flatten(), minlength=8) / (60 * 4)
    torch.testing.assert_close(Switch().loss(routing, Scope()), 8 * (f * routing.probs_TE.mean(0)).sum())


def test_votes_keep_few_experts_of_each_group_and_tie_tokens_together():
    router = MoGE(16, 16, 2, 1, voted=2)
    assert not router.causal
    x = torch.randn(100, 16)
    routing = router(x, CTX)
    for group in range(2):
        chosen = routing.experts_TK[:, group].unique()
        assert len(chosen) <= 2
        free = MoGE(16, 16, 2, 1)
        free.score.weight.data.copy_(router.score.weight.data)
        votes = torch.bincount(free(x, CTX).experts_TK[:, group], minlength=16)
        assert votes[chosen].min() >= votes[group * 8 : group * 8 + 8].sort(descending=True).values[1]
    assert len(router(x, RoutingContext(mode="train")).experts_TK.unique()) > 4, "training does not vote"
    mask = torch.arange(100) < 50
    padded = router(torch.cat([x[:50], torch.randn(50, 16)]), RoutingContext(mask=mask))
    assert torch.equal(padded.experts_TK[:50], router(x[:50], CTX).experts_TK), "padding has no vote"
    with pytest.raises(BadInput, match="causal"):
        MoE(16, 16, "moge", causal=True, router_options={"groups": 2, "voted": 2})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"groups": 3}, "groups=3 does not divide experts=8"),
        ({"groups": 4, "per_group": 3}, "has 2 experts"),
        ({"groups": 2, "voted": 5}, "voted=5"),
    ],
)
def test_groups_that_cannot_be_are_refused(options, says):
    with pytest.raises(BadInput, match=says):
        MoGE(16, 8, **options)
