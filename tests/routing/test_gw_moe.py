"""Card: routing.md, "GW-MoE": what must hold."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.gw_moe import GWMoE
from moesaic.routing.topk import TopK


def ctx(tokens, sequences=1, mode="train", **kw):
    ids = torch.arange(sequences).repeat_interleave(tokens // sequences)
    return RoutingContext(mode=mode, sequence_ids=ids, **kw)


def router(**options):
    built = GWMoE(8, 8, **options)
    with torch.no_grad():
        built.score.weight.copy_(torch.eye(8))
    return built


def all_experts(routing):
    return (routing.experts_TK >= 0).sum(1) == 8


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 3, "renormalise": True}])
def test_a_threshold_above_ln_e_is_ordinary_fine_tuning(options):
    x = torch.randn(40, 8)
    routing = router(threshold=math.log(8) + 0.01, **options)(x, ctx(40))
    plain = TopK(8, 8, options["k"], convention="renormalised" if "renormalise" in options else "softmax")
    plain.score.weight.data.copy_(torch.eye(8))
    want = plain(x, RoutingContext())
    assert torch.equal(routing.experts_TK[:, : options["k"]], want.experts_TK)
    assert (routing.experts_TK[:, options["k"] :] == -1).all()
    torch.testing.assert_close(routing.weights_TK[:, : options["k"]], want.weights_TK)


def test_a_threshold_of_zero_with_room_is_dense_training():
    moe, x = MoE(16, 8, "gw_moe", router_options={"threshold": 0.0, "slots": 99}).train(), torch.randn(20, 16)
    y, routing = moe(x, ctx(20))
    each = [moe.bank(x, torch.tensor([0] * (e + 1) + [20] * (8 - e))) for e in range(8)]
    torch.testing.assert_close(y, sum(routing.probs_TE[:, e : e + 1] * each[e] for e in range(8)), rtol=1e-4, atol=1e-5)


def test_entropy_is_in_nats_and_the_default_is_the_paper_s():
    assert router().threshold == pytest.approx(1.6)
    x = 2 * torch.randn(300, 8)
    h = -(x.softmax(-1) * (x.softmax(-1) + 1e-5).log()).sum(1)
    assert torch.equal(all_experts(router(slots=300)(x, ctx(300))), h >= 1.6)


def test_slots_are_taken_in_order_per_sequence_and_not_by_padding():
    x = torch.zeros(30, 8)  # everyone is unsure
    assert all_experts(router(slots=4)(x, ctx(30, 3))).tolist() == ([True] * 4 + [False] * 6) * 3
    mask = torch.arange(30) % 10 >= 2
    kept = all_experts(router(slots=4)(x, ctx(30, 3, mask=mask)))
    assert kept.tolist() == ([False] * 2 + [True] * 4 + [False] * 4) * 3


def test_evaluation_does_not_depend_on_the_threshold():
    x = torch.randn(30, 8)
    a, b = (router(threshold=t)(x, ctx(30, mode="eval")) for t in (0.0, 9.0))
    assert torch.equal(a.experts_TK, b.experts_TK) and a.experts_TK.shape == (30, 1)
    assert torch.equal(a.weights_TK, b.weights_TK)


def test_gradient_reaches_all_experts_for_broadcast_tokens_only():
    for scale, reached in ((0.0, 8), (9.0, 1)):
        moe = MoE(16, 8, "gw_moe").train()
        with torch.no_grad():
            moe.router.score.weight.mul_(50 * scale)
        moe(torch.randn(1, 16), ctx(1))[0].sum().backward()
        assert int((moe.bank.down_EDI.grad.flatten(1).abs().sum(1) > 0).sum()) == reached
    with pytest.raises(BadInput, match="slots=-1"):
        GWMoE(8, 8, slots=-1)
