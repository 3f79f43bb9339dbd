"""Card: routing.md, "EvoMoE": gate, loss and spawning."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.evomoe import EvoMoELoad
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.routing import Routing
from moesaic.experts.spawn import spawn
from moesaic.layers.moe import MoE
from moesaic.routing.evomoe import EvoMoE

EVAL = RoutingContext()


def train(step=0):
    return RoutingContext(mode="train", step=step)


def unit_logits(experts, **options):
    router = EvoMoE(experts, experts, **options)
    with torch.no_grad():
        router.score.weight.copy_(torch.eye(experts))
    return router


@pytest.mark.parametrize(("experts", "wanted"), [(8, [8.0, 7.8, 5.6, 3.5, 1.7]), (64, [63.9, 46.4, 14.3, 6.4, 1.8])])
def test_mean_number_of_active_experts_falls_with_tau(experts, wanted):
    """The card's table: N(0, 1) logits, Gumbel noise, threshold 0.001."""
    active = []
    for tau in (2.0, 1.0, 0.5, 0.3, 0.1, 0.001):
        routing = unit_logits(experts, tau=tau)(torch.randn(1500, experts), train())
        active.append((routing.experts_TK >= 0).sum(1).float().mean().item())
    assert active[:5] == pytest.approx(wanted, rel=0.1)
    assert active[-1] == pytest.approx(1, abs=0.02), "tau -> 0 leaves one"


def test_thousands_of_experts_are_dense_at_first():
    x = torch.randn(20, 2000)
    scaled = (unit_logits(2000, tau=2.0)(x, train()).experts_TK >= 0).sum(1).float().mean()
    fixed = (unit_logits(2000, tau=2.0, threshold=0.00049)(x, train()).experts_TK >= 0).sum(1).float().mean()
    assert scaled > 1500 > 2 * fixed


def test_weights_are_the_softmax_or_the_gate_and_the_hard_stage_has_one():
    x = torch.randn(50, 8)
    routing = unit_logits(8)(x, train())
    chosen = routing.experts_TK >= 0
    torch.testing.assert_close(routing.weights_TK[chosen], routing.probs_TE[chosen])
    gumbel = unit_logits(8, gumbel_weights=True, threshold=0.0)(x, train())
    torch.testing.assert_close(gumbel.weights_TK.sum(1), torch.ones(50))
    router = unit_logits(8, hard_after=10)
    assert router(x, train(9)).experts_TK.shape[1] == 8
    hard = router(x, train(10))
    assert hard.experts_TK.shape[1] == 1
    assert not torch.equal(hard.experts_TK[:, 0], hard.logits_TE.argmax(1)), "the noisy argmax"


def test_evaluation_is_plain_top_one():
    routing = unit_logits(8)(x := torch.randn(50, 8), EVAL)
    assert torch.equal(routing.experts_TK[:, 0], x.argmax(1))
    torch.testing.assert_close(routing.weights_TK[:, 0], x.softmax(-1).amax(1))


def test_tau_follows_its_schedule_and_is_remembered():
    router = unit_logits(8, tau={"schedule": "exponential", "start": 2.0, "end": 0.3, "steps": 100})
    router(torch.randn(3, 8), train(50))
    assert router.tau(train(50)) == pytest.approx((2.0 * 0.3) ** 0.5)
    assert router.tau(EVAL) == pytest.approx((2.0 * 0.3) ** 0.5)
    with pytest.raises(MissingNeed, match="step"):
        MoE(16, 8, "evomoe", host=set())
    assert MoE(16, 8, "evomoe", host=set(), router_options={"tau": 0.5})
    with pytest.raises(BadInput, match="threshold="):
        EvoMoE(16, 8, threshold=0.5)
    with pytest.raises(BadInput, match="tau"):
        EvoMoE(16, 8, tau=0.0)


def test_load_loss_by_hand_with_gradient_through_weights():
    weights = torch.tensor([[0.6, 0.3], [0.5, 0.0]], requires_grad=True)
    routing = Routing(torch.zeros(2, 3), None, torch.tensor([[0, 2], [1, -1]]), weights)
    loss = EvoMoELoad().loss(routing, Scope())
    assert loss.item() == pytest.approx(9 * (0.3 * 0.5 + 0.25 * 0.5 + 0.15 * 0.5) / 3)
    loss.backward()
    assert (weights.grad != 0).tolist() == [[True, True], [True, False]]


def test_spawning_without_masks_keeps_the_model():
    for gate in ({"gumbel_weights": True, "threshold": 0.0}, {}):
        moe = MoE(16, 8, "evomoe", router_options=gate).train()
        spawn(moe.bank, source=3, zeroed=0.0)
        x = torch.randn(20, 16)
        y, routing = moe(x, train())
        alone = moe.bank(x, torch.tensor([0, 20] + [20] * 7))
        torch.testing.assert_close(y, routing.weights_TK.sum(1, keepdim=True) * alone, rtol=1e-4, atol=1e-5)


def test_spawned_experts_differ_by_their_own_mask_or_noise():
    bank = MoE(16, 4).bank
    parent = bank[1]
    spawn(bank, 1, zeroed=0.5)
    zeros = [(bank.peek(e)["gate_up_EHD"] == 0) for e in range(4)]
    for mask in zeros:
        assert 0.4 < mask.float().mean() < 0.6
    assert not torch.equal(zeros[0], zeros[2])
    kept = ~zeros[0]
    assert torch.equal(bank.peek(0)["gate_up_EHD"][kept], parent["gate_up_EHD"][kept])
    assert torch.equal(bank.peek(0)["down_EDI"], parent["down_EDI"])
    spawn(bank, 1, zeroed=0.0, noise=0.02)
    assert not torch.equal(bank.peek(0)["gate_up_EHD"], bank.peek(2)["gate_up_EHD"])
    with pytest.raises(BadInput, match="zeroed=1"):
        spawn(bank, zeroed=1)
