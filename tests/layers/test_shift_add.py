"""Card: layers-and-balancing.md, "ShiftAddViT": what must hold of the shift expert and the latency loss."""

from __future__ import annotations

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.latency import Latency, unbiased_variation
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.experts.mlp import Mlp
from moesaic.experts.shift_add import ShiftAdd, fixed_point, shift_weight, to_shift
from moesaic.layers.shift_add import ShiftAddLayer


def top1(experts, ids, weights=None, **aux):
    ids = torch.tensor(ids).unsqueeze(1)
    weights = torch.ones(len(ids), 1) if weights is None else weights
    return Routing(torch.zeros(len(ids), experts), experts_TK=ids, weights_TK=weights, aux=aux)


def test_signed_powers_of_two_convert_exactly_and_zero_stays_zero():
    weight = torch.tensor([[1.0, -0.5, 2.0**-14], [0.0, -(2.0**-7), 0.25]])
    assert torch.equal(shift_weight(*to_shift(weight)), weight)
    bank = ShiftAdd(4, 2, 4)
    powers = [torch.exp2(-torch.randint(0, 5, (4, 4)).float()) * torch.randn(4, 4).sign() for _ in range(2)]
    bank.convert(1, *powers)
    plain = Mlp(4, 1, 4)
    plain[0] = {"in_EID": powers[0], "out_EDI": powers[1]}
    x = torch.randint(-8, 8, (9, 4)).float() / 4
    torch.testing.assert_close(bank(x, torch.tensor([0, 0, 9])), plain(x, torch.tensor([0, 9])), rtol=0, atol=2e-4)


def test_a_weight_is_off_by_at_most_the_root_of_two():
    weight = torch.rand(10000, dtype=torch.float64) * (1 - 2.0**-14) + 2.0**-14
    off = (shift_weight(*to_shift(weight)) / weight - 1).abs()
    assert 0.35 < off.max() <= 2**0.5 - 1 + 1e-9


def test_gradients_pass_the_rounding_inside_the_clamp_and_stop_outside():
    shift = torch.tensor([-3.4, 0.5, -14.5, -13.9], requires_grad=True)
    sign = torch.tensor([0.9, 1.0, -1.0, -0.6], requires_grad=True)
    weight = shift_weight(shift, sign)
    torch.testing.assert_close(weight, torch.tensor([2.0**-3, 1.0, -(2.0**-14), -(2.0**-14)]))
    g_shift, g_sign = torch.autograd.grad(weight.sum(), [shift, sign])
    ln2 = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(g_shift, torch.tensor([2.0**-3, 0.0, 0.0, -(2.0**-14)]) * ln2)
    torch.testing.assert_close(g_sign, weight.abs())
    x = torch.tensor([1 / 3, 5e4], requires_grad=True)
    rounded = fixed_point(x)
    assert rounded[0] * 65536 == round(65536 / 3) and rounded[1] <= 2**15
    assert torch.autograd.grad(rounded.sum(), x)[0].tolist() == [1, 0]


def test_the_loss_is_zero_exactly_at_counts_inverse_to_latency():
    loss = Latency(latencies=[6, 4])
    assert loss.loss(top1(2, [0] * 4 + [1] * 6), Scope()).item() == pytest.approx(0, abs=1e-9)
    for mult in (0, 3, 5, 10):
        assert loss.loss(top1(2, [0] * mult + [1] * (10 - mult)), Scope()) > 1e-3


def test_equal_latencies_are_the_ordinary_loss():
    ids = [0, 1, 1, 2, 2, 2]
    weights = torch.rand(6, 1)
    got = Latency(latencies=[3.0, 3.0, 3.0]).loss(top1(3, ids, weights), Scope())
    summed = torch.zeros(3).index_add(0, torch.tensor(ids), weights[:, 0])
    torch.testing.assert_close(got, unbiased_variation(summed) + unbiased_variation(torch.tensor([1.0, 2.0, 3.0])))
    torch.testing.assert_close(got, Latency().loss(top1(3, ids, weights), Scope()))
    with pytest.raises(BadInput, match="one for each of the router's 3"):
        Latency(latencies=[6, 4]).loss(top1(3, ids), Scope())


def test_the_bank_tells_cost_and_latency_and_the_task_reaches_the_router():
    layer = ShiftAddLayer(16, 4).train()
    assert layer.bank.shifts_E.tolist() == [False, False, True, True]
    assert layer.bank.latency_E.tolist() == [6, 6, 4, 4]
    assert layer.bank.cost_E.tolist() == [1024, 1024, 512, 512]
    y, routing = layer(torch.randn(20, 16), RoutingContext(mode="train"))
    (grad,) = torch.autograd.grad(y.square().sum(), layer.router.score.score.weight)
    assert grad.abs().sum() > 0 and routing.aux["loss/latency"] >= 0
    with pytest.raises(BadInput, match="at least one must multiply"):
        ShiftAdd(16, 2, shifts=2)


def test_the_latency_loss_sends_more_tokens_to_the_shift_expert():
    layer = ShiftAddLayer(16, 2, alpha=1.0).train()
    with torch.no_grad():
        layer.router.score.score.weight.normal_()
    x = torch.randn(400, 16)
    x[:, 0] += 1.0
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=1e-2)
    for _ in range(150):
        routing = layer(x, RoutingContext(mode="train"))[1]
        routing.aux["loss/latency"].backward()
        optimizer.step()
        optimizer.zero_grad()
    share = (layer(x)[1].counts_E() / 400)[1].item()
    assert share == pytest.approx(0.6, abs=0.07)
