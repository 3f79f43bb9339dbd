"""NAEE's skipping: never at 0, top-1 from 1 on, about half of the tokens at the median."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.steering import bound
from moesaic.steering.naee_skip import NaeeSkip, median_ratios


def test_zero_never_skips_and_one_is_top_1(mixtral, ids, routings):
    blocks = moesaic.view(mixtral)
    plain = routings(blocks, mixtral, ids)
    never = routings(blocks, mixtral, ids, policy=bound(mixtral, NaeeSkip(0.0)).start([]).policy)
    first = routings(blocks, mixtral, ids, policy=bound(mixtral, NaeeSkip(1.0)).start([]).policy)
    assert torch.equal(plain[0].weights_TK, never[0].weights_TK)
    assert torch.equal(plain[0].experts_TK, never[0].experts_TK)
    assert ((first[0].experts_TK >= 0).sum(1) == 1).all()
    torch.testing.assert_close(first[0].weights_TK.sum(1), torch.ones(14))
    best_T = plain[0].experts_TK.gather(1, plain[0].weights_TK.argmax(1, keepdim=True))[:, 0]
    assert torch.equal(first[0].experts_TK.amax(1), best_T)


def test_the_card_s_rule_by_hand(mixtral, ids, routings):
    blocks = moesaic.view(mixtral)
    plain = routings(blocks, mixtral, ids)[0]
    skipped = routings(blocks, mixtral, ids, policy=bound(mixtral, NaeeSkip({0: 0.8})).start([]).policy)
    w1_T, w2_T = plain.weights_TK.amax(1), plain.weights_TK.amin(1)
    assert torch.equal((skipped[0].experts_TK < 0).any(1), w2_T < 0.8 * w1_T)
    assert (skipped[1].experts_TK >= 0).all(), "other layers skip nothing"


def test_the_median_skips_half(bundled):
    model, tokenizer = bundled
    blocks = moesaic.view(model)
    text = tokenizer(
        "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife."
    )
    medians = median_ratios(model, blocks, [text["input_ids"]])
    seen = []
    with (
        blocks.policy(bound(model, NaeeSkip(medians)).start([]).policy),
        blocks.on_route(lambda r, b: seen.append(r.experts_TK)),
    ):
        model(input_ids=torch.tensor([text["input_ids"]]))
    share = float((seen[0] < 0).any(1).float().mean())
    assert 0.4 <= share <= 0.6, "of the first layer, whose input skipping does not change"


def test_bad_input_is_named(mixtral):
    for beta in (-1, float("nan"), "x", True, {0: -2.0}):
        with pytest.raises(BadInput, match="beta"):
            NaeeSkip(beta)
    with pytest.raises(BadInput, match="no MoE block 9"):
        bound(mixtral, NaeeSkip({9: 0.5}))
