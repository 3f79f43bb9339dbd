"""Cards: "Switch / GShard load-balance loss", "DeepSeekMoE", "HMoE", the top-k card's importance and load terms."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.device import Device
from moesaic.balancing.entropy import Entropy
from moesaic.balancing.importance import Importance
from moesaic.balancing.p_penalty import ParameterPenalty
from moesaic.balancing.sequence import Sequence
from moesaic.balancing.smooth_load import SmoothLoad
from moesaic.balancing.switch import Switch
from moesaic.balancing.z import Z
from moesaic.core.context import RoutingContext
from moesaic.core.routing import Routing
from moesaic.routing.select import top_k
from moesaic.routing.topk import TopK

ALL = Scope()


def routing_of(logits, k=2):
    probs = logits.softmax(-1)
    ids = top_k(logits, k)
    return Routing(logits, probs, ids, probs.gather(1, ids))


def test_switch_gradient_formula_flows_through_p_alone():
    logits = torch.randn(30, 6, dtype=torch.float64, requires_grad=True)
    routing = routing_of(logits)
    Switch().loss(routing, ALL).backward()
    p = logits.detach().softmax(-1)
    f = routing.counts_E().double() / 60
    want = 6 / 30 * p * (f - (p * f).sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, want, rtol=1e-5, atol=1e-9)


def test_z_gradient_formula():
    logits = torch.randn(30, 6, requires_grad=True)
    Z().loss(routing_of(logits), ALL).backward()
    p, lse = logits.detach().softmax(-1), logits.detach().logsumexp(-1, keepdim=True)
    torch.testing.assert_close(logits.grad, 2 / 30 * lse * p)


def test_uniform_probability_gives_one_whatever_the_load():
    routing = Routing(torch.zeros(10, 4), torch.full((10, 4), 0.25), torch.zeros(10, 2, dtype=torch.long), torch.ones(10, 2))
    assert Switch().loss(routing, ALL).item() == pytest.approx(1.0)


def test_one_is_not_a_lower_bound():
    p = torch.tensor([[0.26, 0.24, 0.25, 0.25], [0.0, 0.34, 0.33, 0.33]])
    routing = Routing(p.clamp(min=1e-9).log(), p, p.argmax(1, keepdim=True), torch.ones(2, 1))
    assert Switch().loss(routing, ALL).item() == pytest.approx(4 * (0.5 * 0.13 + 0.5 * 0.29))


def test_a_constant_per_token_moves_only_the_z_loss():
    logits = torch.randn(30, 6)
    a, b = routing_of(logits), routing_of(logits + torch.randn(30, 1))
    torch.testing.assert_close(Switch().loss(a, ALL), Switch().loss(b, ALL))
    assert (Z().loss(a, ALL) - Z().loss(b, ALL)).abs() > 1e-2


def test_counts_come_before_capacity():
    router = TopK(16, 8, capacity_factor=0.3)
    free = TopK(16, 8)
    free.score.weight.data.copy_(router.score.weight.data)
    x = torch.randn(200, 16)
    ctx = RoutingContext(mode="train")
    bound = router(x, ctx)
    assert bound.dropped_TK.any()
    torch.testing.assert_close(Switch().loss(bound, ALL), Switch().loss(free(x, ctx), ALL))


def test_global_counts_replace_local_ones_and_are_reduced():
    routing = routing_of(torch.randn(30, 6))
    given = torch.tensor([1.0, 0, 0, 0, 0, 0])
    want = 6 * routing.probs_TE.mean(0)[0]
    torch.testing.assert_close(Switch().loss(routing, Scope(total=lambda name, counts: given)), want)
    doubled = Switch().loss(routing, Scope(total=lambda name, counts: counts * 2))
    torch.testing.assert_close(doubled, Switch().loss(routing, ALL))


def test_device_loss_limits():
    routing = routing_of(torch.randn(50, 8))
    torch.testing.assert_close(Device(devices=8).loss(routing, ALL), Switch().loss(routing, ALL))
    torch.testing.assert_close(Device(devices=1).loss(routing, ALL), torch.tensor(1.0))


def test_sequence_loss_is_one_when_uniform_and_per_sequence():
    ids = torch.arange(12).view(6, 2) % 4
    routing = Routing(torch.zeros(6, 4), torch.full((6, 4), 0.25), ids, torch.ones(6, 2))
    groups = torch.arange(2).repeat_interleave(3)
    assert Sequence().loss(routing, Scope(sequence_ids=groups)).item() == pytest.approx(1.0)
    skew = routing_of(torch.randn(6, 4))
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        half = Routing(skew.logits_TE[part], skew.probs_TE[part], skew.experts_TK[part], skew.weights_TK[part])
        halves.append(Switch().loss(half, ALL))
    torch.testing.assert_close(Sequence().loss(skew, Scope(sequence_ids=groups)), torch.stack(halves).mean())


def test_equal_widths_make_the_penalty_k_times_switch():
    routing = routing_of(torch.randn(50, 8), k=3)
    torch.testing.assert_close(ParameterPenalty(widths=[7] * 8).loss(routing, ALL), 3 * Switch().loss(routing, ALL))


def test_penalty_gradient_sign_follows_activated_width():
    logits = torch.zeros(40, 4, requires_grad=True)
    ids = torch.arange(40).view(40, 1) % 4
    routing = Routing(logits, logits.softmax(-1), ids, torch.ones(40, 1))
    ParameterPenalty(widths=[1, 2, 3, 10]).loss(routing, ALL).backward()
    grad = logits.grad.mean(0)
    assert grad[3] > 0 and (grad[:3] < 0).all()  # M of equal counts is proportional to width; the mean is 4


def test_entropy_gradient_sharpens():
    logits = torch.randn(20, 5, requires_grad=True)
    before = Entropy().loss(routing_of(logits), ALL)
    before.backward()
    after = Entropy().loss(routing_of((logits - 5 * logits.grad).detach()), ALL)
    assert after < before


def test_importance_and_smooth_load_vanish_at_balance():
    even = Routing(torch.zeros(8, 4), torch.full((8, 4), 0.25), torch.zeros(8, 2).long(), torch.ones(8, 2))
    assert Importance().loss(even, ALL).item() == pytest.approx(0.0, abs=1e-6)
    router = TopK(16, 4, noise="shazeer")
    routing = router(torch.randn(500, 16), RoutingContext(mode="train"))
    fair = SmoothLoad().loss(routing, ALL)
    skewed = routing.replace(logits_TE=routing.logits_TE + torch.tensor([5.0, 0, 0, 0]))
    assert 0 <= fair < 0.1 < SmoothLoad().loss(skewed, ALL)
