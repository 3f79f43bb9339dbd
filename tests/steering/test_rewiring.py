"""Rewiring: nothing at zero, no gradient along a shift, untouched layers stay zero, the context's loss falls, no leak."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.rewiring import Rewiring, context_loss, descent, weights_of_layers
from moesaic.view import Policy
from moesaic.view.course import finish


def zeros(blocks):
    return {block.name: torch.zeros(block.num_experts) for block in blocks}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Gemma4ForCausalLM"])
def test_zero_is_bit_exact(make, ids, name):
    model = make(name)
    blocks = moesaic.view(model)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with blocks.policy(logits=zeros(blocks)):
            assert torch.equal(model(input_ids=ids).logits, plain)
    greedy = model.generate(ids[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(write(model, ids[:1], bound(model, Rewiring(steps=0)), max_new_tokens=8, do_sample=False), greedy)


def test_a_shift_changes_nothing_and_gets_no_gradient(mixtral, ids):
    blocks = moesaic.view(mixtral)
    deltas = {name: value.requires_grad_() for name, value in zeros(blocks).items()}
    slopes = torch.autograd.grad(context_loss(mixtral, blocks, ids[0].tolist(), deltas), list(deltas.values()))
    for slope in slopes:
        assert slope.abs().max() > 0
        assert abs(float(slope.sum())) < 1e-6
    with torch.no_grad():
        shifted = context_loss(mixtral, blocks, ids[0].tolist(), {name: value + 3.0 for name, value in deltas.items()})
        assert float(shifted) == pytest.approx(float(context_loss(mixtral, blocks, ids[0].tolist(), deltas)), abs=1e-5)


@pytest.mark.parametrize("layers", ["decisive", "undecided", "all", "soft"])
def test_the_loss_of_the_context_falls_and_other_layers_stay(mixtral, layers):
    blocks = moesaic.view(mixtral)
    ids = torch.randint(8, 80, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    deltas, losses = finish(descent(mixtral, blocks, ids, zeros(blocks), 8, 0.5, layers, 0.5))
    with torch.no_grad():
        after = float(context_loss(mixtral, blocks, ids, deltas))
    assert after < losses[0]
    moved = [name for name, value in deltas.items() if value.abs().max() > 0]
    assert len(moved) == (2 if layers in ("decisive", "undecided") else 4)


def test_which_layers_learn():
    found = {"a": 1.0, "b": 0.5, "c": 2.0, "d": 1.5}
    assert weights_of_layers(found, "decisive", 0.5) == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
    assert weights_of_layers(found, "undecided", 0.25) == {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0}
    soft = weights_of_layers(found, "soft", 0.5)
    assert sum(soft.values()) == pytest.approx(4.0)
    assert soft["b"] == max(soft.values())


def test_vectors_of_a_batch_do_not_leak(mixtral, ids):
    """[B, L, E] as rows of policies: the gradient of one row's loss reaches its own vectors only, and texts are as alone."""
    blocks = moesaic.view(mixtral)
    rows = [
        {b.name: torch.randn(8, generator=torch.Generator().manual_seed(r)).requires_grad_() for b in blocks} for r in (0, 1)
    ]
    with blocks.policy(rows=[Policy(logits=row) for row in rows]):
        both = mixtral(input_ids=ids).logits
    for r, row in enumerate(rows):
        with blocks.policy(logits=row):
            torch.testing.assert_close(both[r], mixtral(input_ids=ids[r : r + 1]).logits[0], rtol=1e-5, atol=1e-5)
    loss = both[0].square().sum()
    slopes = torch.autograd.grad(loss, [*rows[0].values(), *rows[1].values()], allow_unused=True)
    assert all(slope is not None and slope.abs().max() > 0 for slope in slopes[:4])
    assert all(slope is None or slope.abs().max() == 0 for slope in slopes[4:])
    with pytest.raises(BadInput, match="share no call"):
        write(mixtral, ids, bound(mixtral, Rewiring(steps=1)), max_new_tokens=2)


def test_writing_is_segments_read_again(mixtral, ids):
    """By hand: fit on the prompt, write 4 tokens under the vectors, fit on all of it, write on from a cache of the new ones."""
    blocks = moesaic.view(mixtral)
    made = write(mixtral, ids[:1], bound(mixtral, Rewiring(steps=2, lr=5.0, every=4)), max_new_tokens=10, do_sample=False)
    text, deltas = ids[0].tolist(), zeros(blocks)
    for room in (4, 4, 2):
        deltas, _ = finish(descent(mixtral, blocks, text, deltas, 2, 5.0, "decisive", 0.5))
        with blocks.policy(logits=deltas):
            text = mixtral.generate(torch.tensor([text]), max_new_tokens=room, do_sample=False)[0].tolist()
    assert made[0].tolist() == text
    assert text != mixtral.generate(ids[:1], max_new_tokens=10, do_sample=False)[0].tolist()
    with torch.inference_mode():  # as serving calls it
        again = write(mixtral, ids[:1], bound(mixtral, Rewiring(steps=2, lr=5.0, every=4)), max_new_tokens=10, do_sample=False)
    assert again[0].tolist() == text


def test_bad_input_is_named(mixtral):
    for options in ({"steps": -1}, {"every": 0}, {"share": 0}, {"layers": "some"}):
        with pytest.raises(BadInput, match="rewiring"):
            Rewiring(**options)
