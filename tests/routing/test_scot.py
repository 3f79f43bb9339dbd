"""Card: routing.md, "Sparsity-Constrained Optimal Transport": the three routers."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.base import Base
from moesaic.routing.scot import Scot
from moesaic.routing.sinkhorn import Sinkhorn

TRAIN, EVAL = RoutingContext(mode="train"), RoutingContext()


def skewed(tokens=64):
    """Tokens of which a greedy router would send most to one expert."""
    return torch.randn(tokens, 16) + 2 * torch.randn(16)


def peak(routing):
    counts = routing.counts_E()
    return (counts.max() / counts.mean()).item()


def sharpen(router, factor=10.0):
    with torch.no_grad():
        router.score.weight.mul_(factor)
    return router


def test_tokens_choose_at_most_k_and_loads_even_out_without_a_loss():
    for k in (1, 2):
        router = sharpen(Scot(16, 8, k, steps=200))
        x = skewed()
        routing = router(x, TRAIN)
        assert routing.experts_TK.shape == (64, k) and (routing.experts_TK[:, 0] >= 0).all()
        assert not routing.aux
        greedy = torch.bincount(routing.probs_TE.topk(k).indices.flatten(), minlength=8)
        assert peak(routing) < 0.7 * (greedy.max() / greedy.float().mean()).item()
    assert peak(sharpen(Scot(16, 8, 1, steps=500))(skewed(), EVAL)) < 2


def test_experts_choose_within_their_capacity():
    routing = sharpen(Scot(16, 8, 2, choose="experts", steps=100))(skewed(), TRAIN)
    assert (routing.counts_E() <= 16).all() and (routing.counts_E() > 0).all()
    assert (routing.pairs.weight_S == routing.probs_TE[routing.pairs.token_S, routing.pairs.expert_S]).all()


def test_weights_are_the_softmax_s_or_the_plan_s_with_gradient():
    x = skewed()
    soft, plan = Scot(16, 8, 2), Scot(16, 8, 2, combine="plan")
    plan.load_state_dict(soft.state_dict())
    a, b = soft(x, TRAIN), plan(x, TRAIN)
    assert torch.equal(a.experts_TK, b.experts_TK)
    chosen = a.experts_TK >= 0
    torch.testing.assert_close(a.weights_TK[chosen], a.probs_TE.gather(1, a.experts_TK.clamp(min=0))[chosen])
    torch.testing.assert_close(b.weights_TK.sum(1), torch.ones(64))
    for routing, router in ((a, soft), (b, plan)):
        (grad,) = torch.autograd.grad((routing.weights_TK[:, 0] * torch.randn(64)).sum(), router.score.weight)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [Scot, Sinkhorn, Base])
def test_one_token_is_greedy_and_padding_takes_no_share(kind):
    router = sharpen(kind(16, 4))
    x = skewed(33)
    one = router(x[:1], TRAIN if kind is Scot else EVAL)
    assert one.experts_TK[0, 0] == one.logits_TE.argmax()
    mask = torch.arange(33) < 24
    padded = router(x, RoutingContext(mode="train", mask=mask))
    alone = router(x[:24], TRAIN)
    assert torch.equal(padded.experts_TK[:24], alone.experts_TK)
    assert (padded.experts_TK[24:] == -1).all()


@pytest.mark.parametrize("kind", [Scot, Sinkhorn, Base])
def test_only_the_pool_by_position_is_causal(kind):
    batch, length = 8, 5
    ctx = RoutingContext(
        mode="train",
        positions=torch.arange(length).repeat(batch),
        sequence_ids=torch.arange(batch).repeat_interleave(length),
    )
    router = sharpen(kind(16, 4, pool="position"))
    assert router.causal and not kind(16, 4).causal and not kind(16, 4, pool="sequence").causal
    x = torch.randn(batch, length, 16)
    later = x.clone()
    later[:, 3:] += 5
    a, b = (router(v.flatten(0, 1), ctx).experts_TK.view(batch, length, -1)[:, :3] for v in (x, later))
    assert torch.equal(a, b)
    with pytest.raises(BadInput, match="causal"):
        MoE(16, 4, kind(16, 4), causal=True)
    with pytest.raises(BadInput, match="pool='row'"):
        kind(16, 4, pool="row")


def test_base_balances_exactly_in_training_and_is_greedy_in_evaluation():
    router, x = sharpen(Base(16, 8)), skewed(64)
    trained = router(x, TRAIN)
    assert trained.counts_E().tolist() == [8.0] * 8
    greedy = router(x, EVAL)
    assert torch.equal(greedy.experts_TK[:, 0], greedy.logits_TE.argmax(1))
    assert peak(greedy) > 1.5
    torch.testing.assert_close(trained.weights_TK, trained.logits_TE.gather(1, trained.experts_TK).sigmoid())


def test_base_starts_as_the_identity_with_orthogonal_centroids():
    moe = MoE(16, 8, "base").train()
    w = moe.router.score.weight
    torch.testing.assert_close(w @ w.T, 0.01 * torch.eye(8), atol=1e-6, rtol=0)
    with torch.no_grad():
        moe.bank.down_EDI.zero_()  # the expert's last map starts at 0: x + sigma * 0
    assert (moe(torch.randn(16, 16), TRAIN)[0] == 0).all()


def test_sinkhorn_evens_training_loads_and_evaluates_greedily():
    router, x = sharpen(Sinkhorn(16, 8)), skewed()
    trained, greedy = router(x, TRAIN), router(x, EVAL)
    assert peak(trained) < 0.8 * peak(greedy)
    assert torch.equal(greedy.experts_TK[:, 0], greedy.logits_TE.argmax(1))
    plan = Sinkhorn(16, 8, k=8, combine="plan")
    weights = plan(x, TRAIN).weights_TK
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), plan.score.weight)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Scot(16, 4, 5), "k=5"),
        (lambda: Scot(16, 4, 0), "k=0"),
        (lambda: Scot(16, 4, choose="both"), "choose='both'"),
        (lambda: Sinkhorn(16, 4, epsilon=0), "epsilon=0"),
    ],
)
def test_what_cannot_be_is_refused(build, says):
    with pytest.raises(BadInput, match=says):
        build()
