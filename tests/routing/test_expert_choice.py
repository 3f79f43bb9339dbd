"""Card: routing.md, "Mixture-of-Experts with Expert Choice Routing": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.routing.expert_choice import ExpertChoice


def test_every_expert_gets_exactly_k_tokens_and_the_mean_is_c():
    routing = ExpertChoice(16, 8, average=2)(torch.randn(64, 16), RoutingContext())
    assert routing.counts_E().tolist() == [16.0] * 8
    per_token = torch.bincount(routing.pairs.token_S, minlength=64)
    assert per_token.float().mean() == 2
    assert per_token.min() < 2 < per_token.max()


def test_permuting_tokens_permutes_the_output():
    moe = MoE(16, 8, "expert_choice")
    x, order = torch.randn(64, 16), torch.randperm(64)
    torch.testing.assert_close(moe(x[order])[0], moe(x)[0][order], rtol=1e-4, atol=1e-5)


def test_a_token_chosen_by_nobody_is_zero():
    moe = MoE(16, 4, "expert_choice", router_options={"average": 0.5})
    y, routing = moe(torch.randn(64, 16))
    alone = torch.bincount(routing.pairs.token_S, minlength=64) == 0
    assert alone.any()
    assert (y[alone] == 0).all() and (y[~alone].abs().sum(1) > 0).all()


def test_c_equals_e_is_the_full_softmax_mixture():
    moe = MoE(16, 4, "expert_choice", router_options={"average": 4})
    x = torch.randn(10, 16)
    y, routing = moe(x)
    p = routing.logits_TE.softmax(-1)
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [10] * (4 - e))) for e in range(4)]
    torch.testing.assert_close(y, sum(p[:, e : e + 1] * each[e] for e in range(4)), rtol=1e-4, atol=1e-5)


def test_no_aux_loss():
    assert not MoE(16, 4, "expert_choice").train()(torch.randn(8, 16))[1].aux


def test_a_later_token_changes_an_earlier_output():
    moe = MoE(16, 4, "expert_choice")
    x = torch.randn(32, 16)
    changed = x.clone()
    with torch.no_grad():
        changed[-1] = 20 * moe.router.score.weight.sum(0) / moe.router.score.weight.norm()
    assert not torch.equal(moe(x)[0][:-1], moe(changed)[0][:-1])
    with pytest.raises(BadInput, match="causal"):
        MoE(16, 4, "expert_choice", causal=True)


def test_pool_by_position_is_causal_and_pool_by_sequence_is_apart():
    batch, length = 6, 5
    x = torch.randn(batch, length, 16)
    ctx = RoutingContext(
        positions=torch.arange(length).repeat(batch), sequence_ids=torch.arange(batch).repeat_interleave(length)
    )
    moe = MoE(16, 3, "expert_choice", causal=True, router_options={"pool": "position"})
    later = x.clone()
    later[:, 3:] += 5
    torch.testing.assert_close(moe(later, ctx)[0][:, :3], moe(x, ctx)[0][:, :3])
    moe = MoE(16, 3, "expert_choice", router_options={"pool": "sequence"})
    other = x.clone()
    other[1:] += 5
    torch.testing.assert_close(moe(other, ctx)[0][0], moe(x, ctx)[0][0])
    with pytest.raises(MissingNeed, match="sequence_ids"):
        moe(x)


def test_small_batches_use_at_least_one_token_and_padding_comes_last():
    router = ExpertChoice(16, 8, average=1)
    assert router(torch.randn(3, 16), RoutingContext()).counts_E().tolist() == [1.0] * 8
    mask = torch.arange(16) < 12
    routing = router(torch.randn(16, 16), RoutingContext(mask=mask))
    assert (routing.pairs.weight_S[~mask[routing.pairs.token_S]] == 0).all()
    assert mask[routing.pairs.token_S].all()  # 12 real tokens, 2 wanted: padding is not needed


def test_a_cap_bounds_the_experts_per_token_and_keeps_loads_even():
    free, capped = ExpertChoice(16, 8, average=2), ExpertChoice(16, 8, average=2, cap=3, sweeps=500)
    with torch.no_grad():
        free.score.weight.mul_(20)
    capped.load_state_dict(free.state_dict())
    x = torch.randn(96, 16)
    x[24:] *= 10
    x[:24] *= 0.01  # undecided tokens: what every expert takes after its own
    a, b = free(x, RoutingContext()), capped(x, RoutingContext())
    over = [(torch.bincount(r.pairs.token_S, minlength=96) - 3).clamp(min=0).sum() for r in (a, b)]
    assert over[1] < 0.5 * over[0], "what is left is the rounding of a plan among near ties"
    assert b.counts_E().tolist() == a.counts_E().tolist() == [24.0] * 8
    assert torch.equal(b.pairs.weight_S, b.probs_TE[b.pairs.token_S, b.pairs.expert_S]), "weights stay softmax values"
    assert b.pairs.weight_S.sum() < a.pairs.weight_S.sum(), "a cap costs mass"
    loose = ExpertChoice(16, 8, average=2, cap=8, sweeps=500)
    loose.load_state_dict(free.state_dict())
    c = loose(x, RoutingContext())
    torch.testing.assert_close(c.pairs.weight_S.sum(), a.pairs.weight_S.sum(), rtol=1e-3, atol=0)  # a cap of E binds nothing
    with pytest.raises(BadInput, match="cap=1"):
        ExpertChoice(16, 8, average=2, cap=1)
