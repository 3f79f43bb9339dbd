"""Policies that reach what the router scores and what becomes of its choice: logits, probs, rank, threshold, the last token."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.view import Policy
from moesaic.view.slots import below, empty

SOFTMAX = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM", "Gemma4ForCausalLM"]


def capture(view, model, ids, **policy):
    """Routings of all blocks under a policy."""
    seen = []
    with view.policy(**policy), view.on_route(lambda routing, block: seen.append(routing)), torch.no_grad():
        model(input_ids=ids)
    return seen


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV3ForCausalLM", "InklingForCausalLM"])
def test_logits_equal_a_router_whose_product_gives_them(make, ids, name):
    """A linear router with a bias vector is the oracle: its product is wrapped to add the vector."""
    model = make(name)
    view = moesaic.view(model)
    delta = torch.linspace(-2, 2, 8)
    steered = capture(view, model, ids, logits={view[0].name: delta})
    router = view[0].router
    own = torch.nn.functional.linear

    def linear(x, w, b=None):
        y = own(x, w, b)
        return y + torch.nn.functional.pad(delta, (0, y.shape[-1] - 8)) if w is router.weight or _same(w, router.weight) else y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        oracle = capture(view, model, ids)
    assert torch.equal(steered[0].experts_TK, oracle[0].experts_TK)
    torch.testing.assert_close(steered[0].weights_TK, oracle[0].weights_TK)
    plain = capture(view, model, ids)
    assert not torch.equal(plain[0].weights_TK, steered[0].weights_TK)


def _same(a, b):
    return a.shape == b.shape and torch.equal(a.float(), b.float())


@pytest.mark.parametrize("name", SOFTMAX)
def test_probs_stand_in_for_the_softmax(make, ids, name):
    model = make(name)
    view = moesaic.view(model)
    probs = torch.softmax(torch.tensor([0.3, 2.0, -1.0, 0.0, 1.5, -0.5, 0.1, 0.2]), 0)
    routing = capture(view, model, ids, probs={0: probs})[0] if view[0].layer == 0 else None
    assert routing is not None
    assert (routing.experts_TK.sort(1).values == torch.tensor([1, 4])).all()
    first, second = routing.weights_TK[routing.experts_TK == 1], routing.weights_TK[routing.experts_TK == 4]
    if name != "Gemma4ForCausalLM":  # whose weights also carry a scale per expert
        torch.testing.assert_close(first / second, (probs[1] / probs[4]).expand_as(first))
    if name == "OlmoeForCausalLM":
        torch.testing.assert_close(first, probs[1].expand_as(first))


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "InklingForCausalLM"])
def test_probs_are_refused_where_no_softmax_scores(make, ids, name):
    model = make(name)
    with (
        moesaic.view(model).policy(probs=torch.full((8,), 1 / 8)),
        pytest.raises(BadInput, match="does not score by a softmax"),
    ):
        model(input_ids=ids)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_is_the_nth_best_of_a_plain_router(make, ids, rank):
    for model, weight in ((make("MixtralForCausalLM"), None), (make("OlmoeForCausalLM"), "p")):
        view = moesaic.view(model)
        plain, ranked = capture(view, model, ids)[0], capture(view, model, ids, rank=rank)[0]
        order_TE = plain.logits_TE.argsort(dim=-1, descending=True)
        assert torch.equal(ranked.experts_TK, order_TE[:, rank - 1 : rank])
        assert plain.experts_TK.shape[1] == 2
        probs_TE = plain.logits_TE.softmax(-1)
        wanted = torch.ones(14, 1) if weight is None else probs_TE.gather(1, ranked.experts_TK)
        torch.testing.assert_close(ranked.weights_TK, wanted)


def test_rank_knows_every_kind_of_router(model, ids, logits):
    """Rank 1 of any architecture is its k = 1."""
    view = moesaic.view(model)
    with view.policy(rank=1):
        ranked = logits(model, ids)
    with view.policy(k=1):
        one = logits(model, ids)
    assert torch.equal(ranked, one)


@pytest.mark.parametrize("implementation", ["eager", "moesaic"])
def test_the_last_token_alone_is_steered(qwen, ids, implementation):
    qwen.set_experts_implementation(implementation)
    view = moesaic.view(qwen)
    steer = Policy(logits=torch.tensor([9.0] + [0.0] * 7), fn=lambda r, b: r.replace(weights_TK=r.weights_TK * 2), at="last")
    plain = capture(view, qwen, ids)[0]
    seen = capture(view, qwen, ids, rows=[steer, None])[0]
    changed_T = (seen.weights_TK != plain.weights_TK).any(1)
    assert changed_T.tolist() == [i == 6 for i in range(14)]
    assert 0 in seen.experts_TK[6]
    both = capture(view, qwen, ids, rows=[steer, steer])[0]
    assert (both.weights_TK != plain.weights_TK).any(1).nonzero().flatten().tolist() == [6, 13]
    order = torch.tensor([0, 1] * 7)
    packed = capture(view, qwen, ids, rows=[steer, None], sequence_ids=order)[0]
    assert (packed.weights_TK != plain.weights_TK).any(1).nonzero().flatten().tolist() == [12]


def test_one_token_of_each_row(qwen, ids):
    """By number from either end, and the end of a prompt but not a step of decoding."""
    view = moesaic.view(qwen)

    def changed(at, given=ids):
        steer = Policy(fn=lambda r, b: r.replace(weights_TK=r.weights_TK * 2), at=at)
        plain, seen = capture(view, qwen, given)[0], capture(view, qwen, given, rows=[steer] * len(given))[0]
        return (seen.weights_TK != plain.weights_TK).any(1).nonzero().flatten().tolist()

    assert changed(0) == [0, 7]
    assert changed(-2) == [5, 12]
    assert changed(7) == changed(-8) == []
    assert changed("prompt") == changed("last") == changed(-1) == [6, 13]
    assert changed("prompt", ids[:, :1]) == []
    assert changed("last", ids[:, :1]) == [0, 1]


def test_threshold_empties_small_slots_and_keeps_the_sum():
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.05, 0.05], [0.4, 0.4, 0.2]])
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0]])
    routing = Routing(torch.zeros(3, 8), experts_TK=ids, weights_TK=weights)
    got = empty(routing, below(routing, 0.25))
    assert got.experts_TK.tolist() == [[0, 1, -1], [3, -1, -1], [6, 7, -1]]
    torch.testing.assert_close(got.weights_TK.sum(1), weights.sum(1))
    torch.testing.assert_close(got.weights_TK[0], torch.tensor([0.625, 0.375, 0.0]))
    assert empty(routing, below(routing, 0.0)) is routing
    assert (empty(routing, below(routing, 1.0)).experts_TK >= 0).sum(1).tolist() == [1, 1, 2]


def test_gradients_reach_logits_and_probs(make, ids):
    """Against finite differences of the model's own loss, in float64."""
    model = make("OlmoeForCausalLM").double()
    view = moesaic.view(model)
    for field, start in (("logits", torch.zeros(8)), ("probs", torch.softmax(torch.linspace(-1, 1, 8), 0))):
        given = start.clone().requires_grad_()

        def loss(value, field=field):
            with view.policy(**{field: {1: value}}):
                return model(input_ids=ids, labels=ids).loss

        (gradient,) = torch.autograd.grad(loss(given), given)
        assert gradient.abs().max() > 0
        if field == "logits":
            assert abs(float(gradient.sum())) < 1e-5  # a softmax router does not see a shift
            with torch.no_grad():
                moved = torch.zeros(8)
                moved[2], moved[3] = 1e-2, -1e-2
                change = (loss(moved) - loss(-moved)) / 2
            assert float(change) == pytest.approx(float((gradient * moved).sum()), rel=0.1, abs=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 9}, "1 to 8, the experts it can rank"),
        ({"rank": 2, "k": 2}, "leave k and force out"),
        ({"rank": True}, "the experts it can rank"),
        ({"threshold": 1.5}, "a share from 0 to 1"),
        ({"threshold": "much"}, "a share from 0 to 1"),
        ({"probs": [0.5] * 8}, "sum to 1"),
        ({"logits": [0.0] * 7}, r"has 8 experts, given \[7\]"),
        ({"logits": [0.0] * 8, "probs": [0.125] * 8}, "leave one out"),
        ({"at": "first"}, "all, last, prompt"),
    ],
)
def test_impossible_policies_are_refused_before_anything_runs(qwen, fields, message):
    with pytest.raises(BadInput, match=message), moesaic.view(qwen).policy(**fields):
        pass


def test_two_policies_as_one(make, ids):
    qwen = make("MixtralForCausalLM")
    view = moesaic.view(qwen)
    double = Policy(fn=lambda r, b: r.replace(weights_TK=r.weights_TK * 2))
    plus = Policy(k=1, fn=lambda r, b: r.replace(weights_TK=r.weights_TK + 1))
    seen = capture(view, qwen, ids, policy=double.both(plus))[0]
    torch.testing.assert_close(seen.weights_TK, torch.full((14, 1), 3.0))
    with pytest.raises(BadInput, match="k is set twice"):
        plus.both(Policy(k=2))
    with pytest.raises(BadInput, match="other tokens than the other"):
        Policy(k=1).both(Policy(rank=1, at="last"))
