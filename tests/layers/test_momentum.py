"""Card: layers-and-balancing.md, "MomentumSMoE": what must hold."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.layers.moe import MoE
from moesaic.layers.momentum import Momentum, robust_constants


def descend(f, x, layers, **options):
    """x after `layers` momentum steps over o = f(x), and the points where f was read."""
    layer, momentum, points = Momentum(x.shape[-1], 4, **options), None, []
    for _ in range(layers):
        points.append(x)
        y, momentum = layer.combine(f(x), momentum)
        x = x + y
    return x, points


def test_without_momentum_it_is_the_plain_layer_up_to_the_sign():
    layer = Momentum(16, 8, mu=0.0, gamma=1.0)
    plain = MoE(16, 8, layer.router, layer.bank)
    x = torch.randn(9, 16)
    y, routing = layer(x, RoutingContext(carry={}))
    torch.testing.assert_close(y, plain(x)[0])
    y, _ = layer(x, RoutingContext(carry=routing.carry))
    torch.testing.assert_close(y, plain(x)[0])
    flipped = Momentum(16, 8, layer.router, layer.bank, mu=0.0, sign=-1.0)
    want = flipped(x, RoutingContext(carry={}))[0]
    with torch.no_grad():
        layer.bank.down_EDI.neg_()
    torch.testing.assert_close(layer(x, RoutingContext(carry={}))[0], want)


def test_momentum_settles_faster_on_a_linear_expert():
    a = torch.linspace(0.1, 1.0, 16)
    x = torch.randn(8, 16)
    slow, _ = descend(lambda x: -a * x, x, 20, mu=0.0)
    fast, _ = descend(lambda x: -a * x, x, 20, mu=0.3)
    assert fast.norm() < 0.5 * slow.norm()


def test_robust_equals_the_cards_recursion_and_plain_steps_at_its_edge():
    torch.manual_seed(1)
    weight = torch.randn(16, 16) * 0.2
    f = lambda x: torch.tanh(x @ weight)  # noqa: E731
    for rho in (0.5, 0.6, 0.75):
        gamma, mu, a = robust_constants(4.0, 2.0, rho)
        x = x0 = torch.randn(5, 16)
        p, points = torch.zeros_like(x), []
        for _ in range(6):
            points.append(x + a * gamma * p)
            p = mu * p + f(points[-1])
            x = x + gamma * p
        end, seen = descend(f, x0, 6, rule="robust", condition=4.0, smoothness=2.0, rho=rho)
        torch.testing.assert_close(torch.stack(seen), torch.stack(points))
        torch.testing.assert_close(end, x + a * gamma * p)
    y = x0
    for point in points:
        torch.testing.assert_close(point, y)
        y = y + f(y) / 2.0


def test_robust_without_the_step_ahead_is_heavy_ball():
    layer = Momentum(16, 4, rule="robust")
    torch.testing.assert_close(torch.tensor([layer.gamma, layer.mu, layer.ahead]), torch.tensor([1.5, 1 / 6, 1 / 9]))
    layer.ahead = 0.0
    heavy = Momentum(16, 4, mu=layer.mu, gamma=layer.gamma)
    o, m = torch.randn(3, 16), torch.randn(3, 16)
    for a, b in zip(layer.combine(o, m), heavy.combine(o, m), strict=True):
        torch.testing.assert_close(a, b)


def test_adam_in_the_first_layer_only_then_heavy_ball():
    layer = Momentum(16, 4, rule="adam", betas=(0.0, 0.0), gamma1=0.8, sign=-1.0)
    o = torch.randn(3, 16)
    y, m = layer.combine(o, None)
    torch.testing.assert_close(y, -0.8 * o / (o.square() + 1e-8).sqrt())
    torch.testing.assert_close(m, o)
    y, after = layer.combine(o, m)
    torch.testing.assert_close(after, 1.7 * o)
    torch.testing.assert_close(y, -after)


def test_a_tokens_momentum_is_its_own_and_starts_anew():
    layer = Momentum(16, 8)
    x = torch.randn(6, 16)
    carry = layer(x, RoutingContext(carry={"other": 1}))[1].carry
    assert carry["other"] == 1, "what others thread is handed on"
    alone = layer(x[2:3], RoutingContext(carry={}))[1].carry["momentum"]
    torch.testing.assert_close(carry["momentum"][2:3], alone)
    between = MoE(16, 8)(x, RoutingContext(carry=carry))[1]
    assert between.carry is carry, "layers without momentum thread it"


def test_refusals():
    with pytest.raises(MissingNeed, match="carry"):
        Momentum(16, 8)(torch.randn(2, 16))
    with pytest.raises(MissingNeed, match="Momentum needs carry"):
        Momentum(16, 8, host=["previous"])
    with pytest.raises(BadInput, match=r"rho=0\.9"):
        Momentum(16, 8, rule="robust", rho=0.9)
    with pytest.raises(BadInput, match="rule='nesterov'"):
        Momentum(16, 8, rule="nesterov")
