"""Card: routing.md, "Sparse MoE as the New Dropout": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.routing.smoe_dropout import SMoEDropout


def train(step):
    return RoutingContext(mode="train", step=step)


def test_k_grows_from_half_to_all_and_never_falls():
    router, x = SMoEDropout(16, 8, steps=100), torch.randn(5, 16)
    seen = [router(x, train(step)).experts_TK.shape[1] for step in range(0, 130, 3)]
    assert seen[0] == 4 and seen[-1] == 8 and seen == sorted(seen)
    for kind in ("cosine", "exponential"):
        other = SMoEDropout(16, 8, {"schedule": kind, "start": 4, "end": 8, "steps": 100})
        assert [other(x, train(step)).experts_TK.shape[1] for step in (0, 100)] == [4, 8]


def test_the_router_is_bit_identical_after_training_even_unfrozen():
    moe = MoE(16, 8, "smoe_dropout", router_options={"steps": 10}, balance={"switch": 0.1}).requires_grad_(True)
    before = {key: value.clone() for key, value in moe.router.named_parameters()}
    optimizer = torch.optim.AdamW(moe.parameters(), 0.1, weight_decay=0.1)
    for step in range(10):
        y, routing = moe(torch.randn(30, 16), train(step))
        (y.square().mean() + sum(routing.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[key], value) for key, value in moe.router.named_parameters())
    assert not any(p.requires_grad for p in SMoEDropout(16, 8).parameters())


def test_all_experts_are_the_softmax_weighted_sum():
    router, x = SMoEDropout(16, 8, k=8), torch.randn(20, 16)
    routing = router(x, RoutingContext(mode="train"))
    torch.testing.assert_close(routing.weights_TK, routing.probs_TE.gather(1, routing.experts_TK))
    torch.testing.assert_close(routing.logits_TE, x @ router.weight.T + router.offset_E)


def test_evaluation_uses_the_k_that_was_reached_or_the_knob():
    router, x = SMoEDropout(16, 8, steps=100), torch.randn(5, 16)
    router(x, train(50))
    saved = SMoEDropout(16, 8, steps=100)
    saved.load_state_dict(router.state_dict())
    assert saved(x, RoutingContext(step=0)).experts_TK.shape[1] == 6
    saved.eval_k = 2
    assert saved(x, RoutingContext()).experts_TK.shape[1] == 2
    assert saved(x, train(100)).experts_TK.shape[1] == 8
    with pytest.raises(BadInput, match="eval_k=9"):
        SMoEDropout(16, 8, eval_k=9)
    with pytest.raises(BadInput, match="between 1 and 8"):
        SMoEDropout(16, 8, k={"schedule": "linear", "start": 4, "end": 16})
