"""Card: routing.md, "Is Temperature Sample Efficient": the degeneracy of the linear gate, and its absence."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.routing.activation_gate import ActivationGate
from moesaic.routing.topk import TopK

EVAL = RoutingContext()


def built(activation, tau=0.7):
    gate = ActivationGate(16, 8, 8, activation, tau)
    with torch.no_grad():
        gate.linear.weight.normal_()
        gate.offset_E.normal_()
    return gate


def scaled(gate, c):
    with torch.no_grad():
        gate.linear.weight.mul_(c)
        gate.offset_E.mul_(c)
        gate.log_tau += torch.tensor(c).log()
    return gate


def test_common_scaling_leaves_the_linear_gate_alone_and_no_other():
    x = torch.randn(40, 16)
    for activation in ("identity", "sigmoid", "tanh", "gelu"):
        gate = built(activation)
        before = gate(x, EVAL).probs_TE
        after = scaled(gate, 3.0)(x, EVAL).probs_TE
        assert torch.allclose(before, after, atol=1e-5) == (activation == "identity")


def test_the_likelihood_is_flat_along_that_direction_for_the_linear_gate():
    x, pull = torch.randn(40, 16), torch.randn(40, 8)
    for activation in ("identity", "tanh"):
        gate = built(activation)
        value = (gate(x, EVAL).probs_TE.clamp(min=1e-9).log() * pull).sum()
        w, b, log_tau = torch.autograd.grad(value, [gate.linear.weight, gate.offset_E, gate.log_tau])
        along = (w * gate.linear.weight).sum() + (b * gate.offset_E).sum() + log_tau
        assert (along.abs() < 1e-3 * log_tau.abs()) == (activation == "identity")


def test_the_formula_and_the_plain_router():
    gate, x = ActivationGate(16, 8, 2, "tanh", 0.5), torch.randn(30, 16)
    want = (torch.tanh(x @ gate.linear.weight.T) + gate.offset_E) / 0.5
    routing = gate(x, EVAL)
    torch.testing.assert_close(routing.logits_TE, want)
    torch.testing.assert_close(routing.weights_TK.sum(1), torch.ones(30))
    linear, plain = ActivationGate(16, 8, 2, "identity"), TopK(16, 8, 2)
    plain.score.weight.data.copy_(linear.linear.weight.data)
    torch.testing.assert_close(linear(x, EVAL).weights_TK, plain(x, EVAL).weights_TK)


def test_tau_is_learned_or_follows_a_schedule_but_not_both():
    fall = {"schedule": "linear", "start": 2.0, "end": 0.5, "steps": 10}
    gate, x = ActivationGate(16, 8, tau=fall, learned=False), torch.randn(5, 16)
    soft, sharp = (gate(x, RoutingContext(mode="train", step=step)).logits_TE for step in (0, 10))
    torch.testing.assert_close(sharp, 4 * soft)
    assert gate.needs == {"step"} and ActivationGate(16, 8).needs == frozenset()
    with pytest.raises(BadInput, match="cannot also be learned"):
        ActivationGate(16, 8, tau=fall)
    with pytest.raises(BadInput, match="activation='relu'"):
        ActivationGate(16, 8, activation="relu")
    with pytest.raises(BadInput, match="tau=0"):
        ActivationGate(16, 8, tau=0)


def fit(activation, n, generator, away):
    """Maximum likelihood of y ~ p(x) over two experts of known means, started at `away` times the truth; tau and w / tau."""
    x = torch.rand(n, 1, generator=generator, dtype=torch.double) * 2 - 1
    sigma = torch.tanh if activation == "tanh" else (lambda l: l)
    truth = torch.tensor([2.0, 0.3, 0.5], dtype=torch.double)  # slope, offset, tau; the second expert's are 0

    def p_first(theta):
        return torch.sigmoid((sigma(theta[0] * x[:, 0]) + theta[1]) / theta[2])

    y = torch.rand(n, generator=generator, dtype=torch.double) < p_first(truth)
    theta = (away * truth).requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def closure():
        optimizer.zero_grad()
        p = p_first(theta).clamp(1e-9, 1 - 1e-9)
        loss = -torch.where(y, p, 1 - p).log().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta[2].item() - 0.5, (theta[0] / theta[2]).item() - 4.0


def test_tau_of_the_linear_gate_stays_where_it_started_and_of_tanh_is_found():
    """The card's experiment, small: error of tau and of slope / tau at two sample sizes."""
    error = {}
    for activation in ("identity", "tanh"):
        for n in (1000, 16000):
            generator = torch.Generator().manual_seed(n)
            found = torch.tensor([fit(activation, n, generator, 0.6 + 0.08 * i) for i in range(12)]).abs()
            error[activation, n] = found.median(0).values.tolist()
    print(error)
    assert error["identity", 16000][0] > 0.5 * error["identity", 1000][0], "tau does not get better"
    assert error["identity", 16000][1] < 0.5 * error["identity", 1000][1], "slope / tau does"
    assert error["tanh", 16000][0] < 0.5 * error["tanh", 1000][0]
