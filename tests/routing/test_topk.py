"""Card: routing.md, "Top-k softmax gating": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.layers.moe import MoE
from moesaic.routing.capacity import apply_capacity, capacity
from moesaic.routing.select import top_k, top_p
from moesaic.routing.topk import TopK

EVAL, TRAIN = RoutingContext(), RoutingContext(mode="train")


def routed(logits_TE, **options):
    """Route fixed logits: the identity as router weight."""
    experts = logits_TE.shape[1]
    router = TopK(experts, experts, **options)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(experts))
    return router, router(logits_TE, EVAL)


def test_renormalised_equals_topk_then_softmax_and_sigmoid_differs():
    logits = torch.randn(50, 8)
    _, b = routed(logits, convention="renormalised")
    _, c = routed(logits, convention="topk_softmax")
    _, d = routed(logits, convention="sigmoid")
    assert torch.equal(b.experts_TK, c.experts_TK)
    torch.testing.assert_close(b.weights_TK, c.weights_TK, rtol=1e-6, atol=1e-7)
    assert (b.weights_TK - d.weights_TK).abs().max() > 0.01


def test_all_experts_renormalised_is_the_dense_mixture():
    moe = MoE(16, 4, router_options={"k": 4})
    x = torch.randn(9, 16)
    y, routing = moe(x)
    p = routing.logits_TE.softmax(-1)
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [9] * (4 - e))) for e in range(4)]
    dense = sum(p[:, e : e + 1] * each[e] for e in range(4))
    torch.testing.assert_close(y, dense, rtol=1e-4, atol=1e-5)


def test_top1_task_gradient_lives_in_a_and_dies_in_b():
    x = torch.randn(20, 16)
    gradients = {}
    for convention in ("softmax", "renormalised", "topk_softmax"):
        torch.manual_seed(1)
        moe = MoE(16, 4, router_options={"k": 1, "convention": convention})
        y, routing = moe(x)
        y.square().sum().backward()
        gradients[convention] = moe.router.score.weight.grad.norm().item()
        if convention == "softmax":
            assert (routing.weights_TK < 1).all()
        else:
            assert torch.equal(routing.weights_TK, torch.ones(20, 1))
    assert gradients["softmax"] > 1e-4
    assert gradients["topk_softmax"] == 0.0
    assert gradients["renormalised"] < 1e-4 * gradients["softmax"]  # p / p: 0 but for rounding


def test_bias_selects_but_never_weighs():
    logits = torch.randn(30, 6)
    router, before = routed(logits, convention="sigmoid")
    router.bias_E += 3.0
    same = router(logits, EVAL)
    assert torch.equal(before.experts_TK, same.experts_TK)
    router.bias_E[5] += 10.0
    after = router(logits, EVAL)
    assert (after.experts_TK[:, 0] == 5).all()
    s = logits.sigmoid().gather(1, after.experts_TK)
    torch.testing.assert_close(after.weights_TK, s / s.sum(1, keepdim=True))
    assert not router.bias_E.requires_grad


@pytest.mark.parametrize("score", ["max", "top2"])
def test_group_limited_selection(score):
    logits = torch.randn(40, 12)
    _, routing = routed(logits, convention="sigmoid", k=3, groups=4, keep_groups=2, group_score=score, scale=2.5)
    s = logits.sigmoid().view(40, 4, 3)
    group = s.amax(-1) if score == "max" else s.topk(2, -1).values.sum(-1)
    best = group.topk(2, -1).indices
    for t in range(40):
        open_to = {int(g) * 3 + j for g in best[t] for j in range(3)}
        want = sorted(open_to, key=lambda e: -s.view(40, 12)[t, e])[:3]
        assert routing.experts_TK[t].tolist() == want
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.full((40,), 2.5))


def test_ties_go_to_the_lowest_expert():
    assert top_k(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2).tolist() == [[1, 2]]
    assert top_k(torch.zeros(1, 70), 3).tolist() == [[0, 1, 2]]


def test_large_capacity_equals_no_capacity_bit_for_bit():
    x = torch.randn(200, 16)
    torch.manual_seed(3)
    free = MoE(16, 8).train()
    torch.manual_seed(3)
    bound = MoE(16, 8, router_options={"capacity_factor": 8.0}).train()
    (y, _), (z, routing) = free(x), bound(x)
    assert torch.equal(y, z)
    assert not routing.dropped_TK.any()


def skewed(tokens=64, experts=8, k=2):
    logits = torch.randn(tokens, experts) + torch.linspace(2, 0, experts)
    p = logits.softmax(-1)
    ids = top_k(logits, k)
    return Routing(logits, p, ids, p.gather(1, ids))


def test_position_policy_keeps_a_prefix_first_choices_first():
    routing = skewed()
    kept = apply_capacity(routing, 6)
    ids, dropped = routing.experts_TK, kept.dropped_TK
    assert dropped.any()
    for e in range(8):
        queue = [(k, t) for k in range(2) for t in range(64) if ids[t, k] == e]
        assert [dropped[t, k].item() for k, t in queue] == [i >= 6 for i in range(len(queue))]
    assert (kept.weights_TK[dropped] == 0).all() and (kept.experts_TK[dropped] == -1).all()
    assert torch.equal(kept.counts_E(), routing.counts_E())


def test_probs_policy_keeps_the_largest_weights():
    routing = skewed()
    kept = apply_capacity(routing, 6, "probs")
    for e in range(8):
        mine = routing.experts_TK == e
        stay, gone = routing.weights_TK[mine & ~kept.dropped_TK], routing.weights_TK[mine & kept.dropped_TK]
        assert len(stay) <= 6
        if len(gone):
            assert stay.min() >= gone.max()


def test_priority_policy_serves_sure_tokens_first():
    routing = skewed()
    kept = apply_capacity(routing, 6, "priority")
    first = routing.experts_TK[:, 0] == 0
    sure = routing.weights_TK[:, 0]
    assert sure[first & ~kept.dropped_TK[:, 0]].min() >= sure[first & kept.dropped_TK[:, 0]].max()
    assert not TopK(8, 8, capacity_factor=1.0, overflow="priority").causal
    with pytest.raises(BadInput, match="causal"):
        MoE(8, 8, causal=True, router_options={"capacity_factor": 1.0, "overflow": "priority"})


def test_capacity_formula():
    assert capacity(4096, 2, 64, 1.25) == 160
    assert capacity(16, 1, 64, 1.0) == 4
    assert capacity(2, 2, 4, 1.0) == 2


def test_noise_is_training_only_and_starts_at_zero_weight():
    router = TopK(16, 8, noise="shazeer")
    x = torch.randn(30, 16)
    assert torch.equal(router(x, EVAL).logits_TE, torch.zeros(30, 8))
    noisy = router(x, TRAIN.replace(generator=torch.Generator().manual_seed(0)))
    assert 0.5 < noisy.logits_TE.std() < 0.9  # softplus(0) = 0.693 times N(0, 1)
    vmoe = TopK(16, 8, noise="vmoe")
    base = vmoe(x, EVAL).logits_TE
    spread = (vmoe(x, TRAIN).logits_TE - base).std()
    assert 0.09 < spread < 0.16  # noise_std / E = 0.125


def test_jitter_multiplies_the_input_in_training():
    router = TopK(16, 8, jitter=0.01)
    x = torch.randn(30, 16)
    exact, jittered = router(x, EVAL).logits_TE, router(x, TRAIN).logits_TE
    assert 0 < (exact - jittered).abs().max() < 0.01 * (x.abs() @ router.score.weight.abs().T).max()


def test_top_p_card_properties():
    p = torch.randn(2000, 8).softmax(-1)
    sizes = {q: (top_p(p, q) >= 0).sum(1).float().mean().item() for q in (0.0, 0.2, 0.4, 0.6, 0.9, 1.0)}
    assert list(sizes.values()) == sorted(sizes.values())
    for q, want in {0.0: 1.0, 0.2: 1.0, 0.4: 1.8, 0.6: 2.7, 0.9: 5.7, 1.0: 8.0}.items():
        assert sizes[q] == pytest.approx(want, abs=0.25)
    uniform = torch.full((1, 8), 1 / 8)
    assert (top_p(uniform, 0.4) >= 0).sum() == int(0.4 * 8) + 1
    one_hot = torch.eye(8)[:1]
    assert (top_p(one_hot, 0.9) >= 0).sum() == 1
    kept = top_p(p, 0.6)
    mass = p.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, 0).sum(1)
    assert (mass > 0.6).all()


def test_top_p_set_shrinks_as_the_top_probability_grows():
    rest = torch.randn(7).softmax(-1)
    sizes = []
    for top in torch.linspace(0.15, 0.95, 20):
        p = torch.cat([top.view(1), (1 - top) * rest]).unsqueeze(0)
        if p[0, 0] >= p[0].max():
            sizes.append(int((top_p(p, 0.6) >= 0).sum()))
    assert len(sizes) > 10
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "k=9 experts per token"),
        ({"groups": 3}, "groups=3 does not divide experts=8"),
        ({"k": 5, "groups": 4, "keep_groups": 2}, "k=5 experts cannot come from 2 groups of 2"),
        ({"convention": "softmin"}, "convention='softmin'"),
    ],
)
def test_impossible_routers_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        TopK(16, 8, **options)


@pytest.mark.parametrize(("k", "overflow", "causal"), [(1, "position", True), (2, "position", False), (1, "probs", False)])
def test_capacity_says_whether_later_tokens_matter(k, overflow, causal):
    """An earlier token's slots under two different futures: they are the same exactly where the router calls itself causal."""
    router = TopK(4, 3, k=k, convention="softmax", capacity_factor=0.5, overflow=overflow)
    assert router.causal is causal
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(3, 4))
    ctx = RoutingContext(mode="train")
    early = torch.tensor([[2.0, 1.9, 0.0, 0.0]]).expand(6, -1)
    futures = [torch.tensor([row]).expand(14, -1) for row in ([0.0, 9.0, 0.1, 0.0], [0.1, 0.0, 9.0, 0.0], [9.0, 0.1, 0.0, 0.0])]
    kept = [router(torch.cat([early, future]), ctx).experts_TK[:6] for future in futures]
    assert all(torch.equal(kept[0], other) for other in kept[1:]) is causal
    if not causal:
        with pytest.raises(BadInput, match="later tokens"):
            MoE(4, 3, router, causal=True, bank_options={"width": 4})
