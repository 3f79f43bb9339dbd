"""Card: layers-and-balancing.md, "Auxiliary-loss-free balancing": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.bias import BiasController
from moesaic.balancing.dual import dual, subgradient
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.layers.moe import MoE
from moesaic.models.reference import ReferenceLM
from moesaic.routing.hash import Hash
from moesaic.routing.topk import TopK

EVAL = RoutingContext()


def fixed(tokens=60, experts=6, k=1, rate=1e-3, skew=1.0, **options):
    """A router that scores given logits (identity weight), with its controller."""
    router = TopK(experts, experts, k=k, convention="sigmoid")
    router.score.weight.data.copy_(torch.eye(experts))
    logits = torch.randn(tokens, experts) + torch.linspace(skew, 0, experts)
    return router, BiasController(rate=rate, **options).bind(router), logits


def test_weights_ignore_the_bias_and_no_gradient_reaches_it():
    moe = MoE(16, 4, balance={"bias": 1e-3}, router_options={"convention": "sigmoid"}).train()
    y, _ = moe(torch.randn(10, 16))
    y.sum().backward()
    assert moe.router.bias_E.grad is None
    assert "router.bias_E" in moe.state_dict() and "router.bias_E" not in dict(moe.named_parameters())


def test_a_constant_bias_changes_nothing():
    router, _, logits = fixed(k=2)
    before = router(logits, EVAL).experts_TK
    router.bias_E += 5
    assert torch.equal(router(logits, EVAL).experts_TK, before)


def test_dual_function_is_convex_with_subgradient_n_minus_c():
    _router, _, logits = fixed(tokens=60, experts=6, k=2)
    g = logits.sigmoid().double()
    for _ in range(20):
        a, b = torch.randn(6).double(), torch.randn(6).double()
        middle = dual(g, 0.5 * (a + b), 2)
        assert middle <= 0.5 * (dual(g, a, 2) + dual(g, b, 2)) + 1e-9
        torch.testing.assert_close(dual(g, a + 3.0, 2), dual(g, a, 2))
        assert dual(g, b, 2) >= dual(g, a, 2) + (subgradient(g, a, 2) * (b - a)).sum() - 1e-9
    leaf = a.clone().requires_grad_()
    dual(g, leaf, 2).backward()
    torch.testing.assert_close(leaf.grad, subgradient(g, a, 2))


def test_no_assignment_that_is_balanced_beats_the_dual():
    _router, _, logits = fixed(tokens=60, experts=6, k=1)
    g = logits.sigmoid().double()
    balanced = g[torch.arange(60), torch.arange(60) % 6].sum()
    assert all(dual(g, torch.randn(6).double(), 1) >= balanced for _ in range(10))


def test_tokens_move_only_from_overloaded_to_underloaded_experts():
    router, controller, logits = fixed(rate=1e-2)
    capacity = 10
    for _ in range(100):
        before = router(logits, EVAL)
        counts = before.counts_E()
        controller.observe(before, Scope())
        controller.after_step()
        after = router(logits, EVAL).experts_TK[:, 0]
        for old, new in zip(before.experts_TK[:, 0].tolist(), after.tolist(), strict=True):
            if old != new:
                assert (counts[old] > capacity and counts[new] <= capacity) or (
                    counts[old] == capacity and counts[new] < capacity
                )


def test_fixed_scores_reach_balance_and_zero_rate_does_nothing():
    router, controller, logits = fixed(rate=1e-3)
    start = router(logits, EVAL).counts_E().max()
    for _ in range(3000):
        controller.observe(router(logits, EVAL), Scope())
        controller.after_step()
    assert start >= 15
    assert router(logits, EVAL).counts_E().max() <= 11
    router, controller, logits = fixed(rate=0.0)
    controller.observe(router(logits, EVAL), Scope())
    controller.after_step()
    assert not router.bias_E.any()


def test_a_balanced_load_moves_nothing():
    router, controller, _ = fixed()
    controller.observe(router(torch.eye(6).repeat(10, 1), EVAL), Scope())
    controller.after_step()
    assert not router.bias_E.any()


def test_counts_sum_over_micro_steps_and_freeze_stops():
    router, controller, _ = fixed()
    only0, others = torch.eye(6)[:1].repeat(30, 1), torch.eye(6)[1:].repeat(30, 1)
    controller.observe(router(only0, EVAL), Scope())
    controller.observe(router(others, EVAL), Scope())
    controller.after_step()
    assert not router.bias_E.any()  # 30 each: balanced over the whole step, though neither micro-step was
    controller.freeze()
    controller.observe(router(only0, EVAL), Scope())
    controller.after_step()
    assert not router.bias_E.any()


def test_proportional_rule():
    router, controller, _ = fixed(rate=0.1, rule="proportional")
    assert not hasattr(router, "bias_steps"), "a rule that does not count steps keeps no step"
    controller.observe(router(torch.eye(6)[:1].repeat(12, 1), EVAL), Scope())
    controller.after_step()
    torch.testing.assert_close(router.bias_E, torch.tensor([-0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))


@pytest.mark.parametrize(("rule", "second"), [("eps_n", 1 / 2), ("eps_sqrt_n", 2**-0.5)])
def test_falling_rates_and_their_step_is_saved(rule, second):
    router, controller, _ = fixed(rate=0.1, rule=rule)
    moves = []
    routing = router(torch.eye(6)[:1].repeat(12, 1), EVAL)
    for _ in range(2):
        before = router.bias_E.clone()
        controller.observe(routing, Scope())
        controller.after_step()
        moves.append(router.bias_E - before)
    torch.testing.assert_close(moves[0], torch.tensor([-0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    torch.testing.assert_close(moves[1], moves[0] * second)
    assert int(router.state_dict()["bias_steps"]) == 2


def test_it_freezes_after_the_given_steps():
    router, controller, _ = fixed(rate=0.1, freeze_after=2)
    for step in range(4):
        controller.observe(router(torch.eye(6)[:1].repeat(12, 1) * 50, EVAL), Scope())
        controller.after_step()
        if step == 1:
            held = router.bias_E.clone()
    assert torch.equal(router.bias_E, held) and held.any()


@pytest.mark.parametrize(("convention", "rate"), [("sigmoid", 1e-3), ("renormalised", 0.1 / 8)])
def test_the_rate_follows_the_scale_of_the_scores(convention, rate):
    assert BiasController().bind(TopK(16, 8, convention=convention)).rate == rate
    for bad in ({"rule": "signs"}, {"rate": -1.0}, {"freeze_after": -1}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            BiasController(**bad)


def test_recomputation_does_not_count_twice():
    biases = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = ReferenceLM(dim=32, heads=2, experts=4, balance={"bias": 0.1}, checkpoint=checkpoint).train()
        loss, _ = model(torch.randint(0, 256, (2, 40)))
        loss.backward()
        controller = model.blocks[0].moe.balancers["bias"]
        assert controller._counts_E.sum() == 2 * 40 * 2
        model.after_step()
        biases.append(model.blocks[0].moe.router.bias_E.clone())
    assert biases[0].any() and torch.equal(*biases)


def test_a_router_without_bias_is_refused():
    with pytest.raises(BadInput, match="Hash has not"):
        BiasController().bind(Hash(4, 4, vocab_size=8))
