"""Card: layers-and-balancing.md, "ShinkaEvolve": the discovered loss, and the language that losses are searched in."""

from __future__ import annotations

import math

import pytest
import torch

from moesaic.balancing.balancer import Scope
from moesaic.balancing.expression import Expression
from moesaic.balancing.language import check, evaluate, parse
from moesaic.balancing.shinka import Shinka, concentration
from moesaic.balancing.switch import Switch
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.models.reference import ReferenceLM
from moesaic.routing.select import top_k

SHINKA = "E * sum(f * P) + 0.1 * stop(1.5 - entropy(P) / log(E)) * sum(below(f, 0.064 / E) * relu(0.064 / E - P))"


def routing_of(logits, k=2):
    probs = logits.softmax(-1)
    ids = top_k(logits, k)
    return Routing(logits, probs, ids, probs.gather(1, ids))


def starved(experts=6, dead=2):
    """The `dead` last experts get no token, and less probability than tau."""
    logits = torch.randn(40, experts)
    logits[:, experts - dead :] -= 12
    return logits.requires_grad_()


def test_with_every_expert_above_the_floor_it_is_the_switch_loss():
    logits = torch.eye(6).repeat(10, 1) * 3
    torch.testing.assert_close(
        Shinka(tau=1.0).loss(routing_of(logits, 1), Scope()), Switch().loss(routing_of(logits, 1), Scope())
    )


def test_a_dead_expert_adds_its_share_of_the_floor():
    routing = routing_of(starved(dead=1))
    p_E = routing.probs_TE.mean(0)
    more = Shinka().loss(routing, Scope()) - Switch().loss(routing, Scope())
    assert more.item() == pytest.approx(0.1 * concentration(p_E).item() * 0.064 / 6, rel=1e-3)


def test_concentration_falls_with_entropy_between_its_ends():
    even, single = torch.full((8,), 1 / 8), torch.eye(8)[0]
    steps = [concentration(even + share * (single - even)).item() for share in (0.0, 0.3, 0.6, 1.0)]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(0.5, abs=1e-5) and steps[-1] == pytest.approx(1.5, abs=1e-5)


def test_the_floor_pulls_starved_experts_up_and_no_other():
    logits = starved()
    routing = routing_of(logits)
    floor = Shinka().loss(routing, Scope()) - Switch().loss(routing, Scope())
    (grad_TE,) = torch.autograd.grad(floor, routing.probs_TE, retain_graph=True)
    assert (grad_TE[:, 4:] < 0).all()
    assert grad_TE[:, :4].abs().max() < 1e-8
    with pytest.raises(BadInput, match=r"tau=1\.5"):
        Shinka(tau=1.5)


def test_the_language_says_what_the_registered_losses_say():
    for logits in (starved(), torch.randn(30, 5, requires_grad=True)):
        routing = routing_of(logits)
        for text, loss in (("E * sum(f * P)", Switch()), (SHINKA, Shinka())):
            pair = []
            for balancer in (Expression(text), loss):
                (grad,) = torch.autograd.grad(balancer.loss(routing, Scope()), logits, retain_graph=True)
                pair.append(grad)
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-8)
    value = "sum(square(q - 1 / E)) + K * 0"
    f_E = routing.counts_E() / routing.counts_E().sum()
    torch.testing.assert_close(Expression(value).loss(routing, Scope()), (f_E - 0.2).square().sum())


@pytest.mark.parametrize(
    "text",
    [SHINKA, "E * sum(f * P)", "-2 * largest(max(P, rank_f)) + std(P) / smallest(f + P)", "mean(exp(sqrt(abs(log(q)))))"],
)
def test_text_and_tree_go_back_and_forth(text):
    tree = parse(text)
    assert parse(str(tree)) == tree
    f_E, p_E = torch.rand(7), torch.rand(7)
    torch.testing.assert_close(evaluate(parse(str(tree)), f_E, p_E, 2.0), evaluate(tree, f_E, p_E, 2.0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("__import__('os').system('true')", "not in the language"),
        ("sum(P).real", "not in the language"),
        ("sum(x * P)", "x: no such name"),
        ("sume(P)", "did you mean sum"),
        ("f * P", "one number per expert"),
        ("sum(f)", "no gradient reaches the router"),
        ("sum(stop(P)) + sum(below(P, f))", "no gradient reaches the router"),
        ("sum(E)", "of a single number"),
        ("max(P)", "takes 2"),
        ("sum(P) +", "not a formula"),
        ("(" * 300 + "1", "not a formula"),
        ("[P for P in f]", "not in the language"),
        ("'a' * 9", "not in the language"),
        ("1e300 * sum(P)", "beyond 1e9"),
        ("+".join(["sum(P)"] * 150), "parts: at most"),
        ("1" * 3000, "at most 2000"),
    ],
)
def test_anything_else_is_refused(text, words):
    with pytest.raises(BadInput, match=words):
        parse(text)


@pytest.mark.parametrize("text", ["sum(P / (f - f))", "mean(log(P - 2))", "sum(exp(exp(exp(50 * P))))", "sum(sqrt(f - 1) / P)"])
def test_every_tree_is_finite_with_a_finite_gradient(text):
    tree = parse(text)
    check(tree)
    for f_E in (torch.full((4,), 0.25), torch.tensor([1.0, 0, 0, 0])):
        p_E = torch.tensor([1.0, 0, 0, 0], requires_grad=True)
        value = evaluate(tree, f_E, p_E, 2.0)
        value.backward()
        assert math.isfinite(value.item()) and p_E.grad.isfinite().all()


def test_a_written_loss_trains_a_model():
    model = ReferenceLM(dim=32, heads=2, experts=4, balance={"expression": {"text": SHINKA, "coefficient": 0.05}}).train()
    loss, routings = model(torch.randint(0, 256, (2, 20)))
    loss.backward()
    assert "loss/expression" in routings[0].aux
    assert model.blocks[0].moe.router.score.weight.grad.abs().sum() > 0
    with pytest.raises(BadInput, match="no such name"):
        ReferenceLM(balance={"expression": {"text": "sum(p)"}})
