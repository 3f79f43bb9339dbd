"""Card: layers-and-balancing.md, "Chain-of-Experts": what must hold."""

from __future__ import annotations

from math import comb

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.chain_of_experts import ChainOfExperts
from moesaic.layers.moe import MoE


def context(tokens, **kw):
    return RoutingContext(carry={}, sequence_ids=torch.zeros(tokens, dtype=torch.long), **kw)


def test_one_pass_without_inner_residual_is_the_standard_layer():
    chain = ChainOfExperts(16, 8, k=2, passes=1, inner=False, outer=True, shared=0)
    plain = MoE(16, 8, chain.router, chain.bank)
    x = torch.randn(9, 16)
    torch.testing.assert_close(chain(x)[0], plain(x)[0])
    assert chain.residual
    released = ChainOfExperts(16, 8, k=2, passes=1, shared=0)
    assert not released.residual, "the released form takes the stream's place: no baseline"


def test_experts_of_zero_leave_the_normalised_input():
    chain = ChainOfExperts(16, 8, k=4)
    with torch.no_grad():
        chain.bank.down_EDI.zero_()
        chain.shared.down_DI.zero_()
    x = torch.randn(5, 16)
    assert torch.equal(chain(x)[0], x)


def test_every_pass_keeps_its_own_selection_and_counts_as_load():
    chain = ChainOfExperts(16, 8, k=6, passes=3, alpha=0.5).train()
    with torch.no_grad():
        for router in chain.routers():
            router.score.weight.normal_()
    x = torch.randn(12, 16)
    routing = chain(x, context(12, mode="train"))[1]
    assert [r.experts_TK.shape for r in routing.passes] == [(12, 2)] * 3
    assert not torch.equal(routing.passes[0].experts_TK, routing.passes[1].experts_TK)
    assert routing.counts_E().sum() == 12 * 6
    want = sum(r.aux["loss/sequence"] for r in routing.passes)
    torch.testing.assert_close(routing.aux["loss/sequence"], want)


def test_the_order_of_passes_is_irrelevant_for_commuting_experts():
    class Scales(torch.nn.Module):  # expert e multiplies by s_e: linear, and all commute
        num_experts, shows_activations, keyed, row_to_expert = 8, False, False, None

        def run(self, x_TD, dispatch, memo=None):
            scale_S = torch.linspace(-0.5, 0.5, 8)[dispatch.expert_S].unsqueeze(1)
            return dispatch.combine(x_TD[dispatch.token_S] * scale_S)

    class Fixed:  # a pass's selection, whatever its input
        def __init__(self, routing):
            self.routing = routing

        def __call__(self, x, ctx):
            return self.routing

    chain = ChainOfExperts(16, 8, k=4, shared=0)
    del chain.bank
    chain.bank = Scales()
    x = torch.randn(7, 16)
    picks = [router(torch.randn(7, 16), context(7)) for router in chain.routers()]
    out = []
    for order in (picks, picks[::-1]):
        chain.routers = lambda order=order: [Fixed(r) for r in order]
        out.append(chain(x)[0])
    torch.testing.assert_close(out[0], out[1])


def test_routers_are_separate_or_shared_and_passes_must_divide():
    count = lambda c: sum(p.numel() for p in c.parameters())  # noqa: E731
    assert count(ChainOfExperts(16, 8, passes=2)) - count(ChainOfExperts(16, 8, passes=2, separate=False)) == 16 * 8
    assert round(comb(64, 4) ** 2 / comb(64, 8), 1) == 91.2
    with pytest.raises(BadInput, match="passes=3 does not divide k=8"):
        ChainOfExperts(16, 8, passes=3)
