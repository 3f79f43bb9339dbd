"""SCMoE: the score's limits, two caches equal to two runs, one batch of two, and rows that do not leak."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import moesaic
from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.scmoe import Scmoe, contrast
from moesaic.view import Policy

GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture
def two():
    random = torch.Generator().manual_seed(4)
    return torch.randn(50, 97, generator=random) * 3, torch.randn(50, 97, generator=random) * 3


def test_the_limits_of_the_score(two):
    strong, weak = two
    best = strong.argmax(-1)
    for alpha in (0.01, 0.1, 1.0):
        assert torch.equal(contrast(strong, weak, 0.0, alpha).argmax(-1), best)
    only = contrast(strong, weak, 0.7, 1.0)
    assert torch.equal(only.argmax(-1), best)
    assert (torch.isfinite(only).sum(-1) == 1).all()
    same = contrast(strong, strong, 0.7, 0.1)
    kept = torch.isfinite(same)
    torch.testing.assert_close(same[kept], strong[kept])
    shifted = contrast(strong, weak + 5.0, 0.7, 0.1)
    plain = contrast(strong, weak, 0.7, 0.1)
    torch.testing.assert_close(shifted.softmax(-1), plain.softmax(-1))
    assert torch.isfinite(plain.gather(-1, best[:, None])).all(), "the strong maximum is always a candidate"
    by_hand = strong[0] * 1.7 - 0.7 * weak[0]
    likely = strong[0].exp() >= 0.1 * strong[0].exp().max()
    torch.testing.assert_close(plain[0], by_hand.masked_fill(~likely, float("-inf")))


def two_runs(model, blocks, ids, beta, alpha, weak, steps):
    """The definition: two models in turn, each with its own cache, both fed with the chosen token."""
    caches, text = [DynamicCache(), DynamicCache()], list(ids)
    given = torch.tensor([text])
    for _ in range(steps):
        logits = []
        for cache, policy in zip(caches, (None, weak), strict=True):
            with blocks.policy(policy), torch.no_grad():
                logits.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[0, -1])
        text.append(int(contrast(*logits, beta, alpha).argmax()))
        given = torch.tensor([text[-1:]])
    return text


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "OlmoeForCausalLM"])
def test_generate_is_two_separate_runs(make, ids, name):
    model = make(name)
    blocks = moesaic.view(model)
    wanted = two_runs(model, blocks, ids[0].tolist(), 2.0, 0.01, Policy(rank=2), 10)
    made = write(model, ids[:1], bound(model, Scmoe(2.0, 0.01)), **GREEDY)
    assert made[0].tolist() == wanted
    if name == "MixtralForCausalLM":
        assert wanted != model.generate(ids[:1], **GREEDY)[0].tolist(), "the contrast has an effect"
        greedy = model.generate(ids[:1], **GREEDY)
        assert torch.equal(write(model, ids[:1], bound(model, Scmoe(0.0)), **GREEDY), greedy)
        assert torch.equal(write(model, ids[:1], bound(model, Scmoe(0.9, 1.0)), **GREEDY), greedy)


def test_one_batch_of_two_is_two_runs(mixtral, ids):
    """Strong and weak row in one call, with one cache, follow their policies as if alone."""
    blocks = moesaic.view(mixtral)
    weak = Policy(rank=2)
    together, apart = DynamicCache(), [DynamicCache(), DynamicCache()]
    for step in (ids[:1], ids[1:, :1], ids[1:, 1:2]):
        with blocks.policy(rows=[None, weak]), torch.no_grad():
            both = mixtral(input_ids=step.expand(2, -1), past_key_values=together, use_cache=True).logits
        for row, policy in enumerate((None, weak)):
            with blocks.policy(policy), torch.no_grad():
                one = mixtral(input_ids=step, past_key_values=apart[row], use_cache=True).logits
            torch.testing.assert_close(both[row], one[0], rtol=1e-5, atol=1e-5)


def test_a_token_costs_one_call(mixtral, ids):
    """Strong and weak rows of both answers share every call; sampling draws one token for both; nothing stays on the model."""
    steer, calls = bound(mixtral, Scmoe(1.5, 0.01)), []
    with bound(mixtral, None).blocks.on_route(
        lambda routing, block: calls.append(routing.tokens) if block.layer == 0 else None
    ):
        made = write(mixtral, ids, steer, max_new_tokens=4, do_sample=False)
    assert calls == [4 * 7, 4, 4, 4]
    assert made.shape == (2, 11)
    torch.manual_seed(0)
    one = write(mixtral, ids[:1], steer, max_new_tokens=8, do_sample=True, temperature=1.5)
    torch.manual_seed(0)
    assert torch.equal(one, write(mixtral, ids[:1], steer, max_new_tokens=8, do_sample=True, temperature=1.5))
    assert not mixtral._forward_hooks and not mixtral._forward_pre_hooks


def test_several_answers_to_a_prompt(mixtral, ids):
    """`num_return_sequences` repeats each row: every copy is mixed with its own weak pass."""
    torch.manual_seed(3)
    how = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2, "top_k": 1}
    made = write(mixtral, ids, bound(mixtral, Scmoe(1.5, 0.01)), **how)
    greedy = write(mixtral, ids, bound(mixtral, Scmoe(1.5, 0.01)), max_new_tokens=5, do_sample=False)
    assert torch.equal(made, greedy.repeat_interleave(2, 0))
    for wrong in ({"num_beams": 2}, {"past_key_values": DynamicCache()}, {"return_dict_in_generate": True}):
        with pytest.raises(BadInput, match="steer"):
            write(mixtral, ids, bound(mixtral, Scmoe()), max_new_tokens=2, **wrong)


def test_rows_and_padding_do_not_leak(mixtral, ids):
    steer = bound(mixtral, Scmoe(1.5, 0.01))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    both = write(mixtral, ids, [steer, steer], attention_mask=mask, **GREEDY)
    assert torch.equal(both[0], write(mixtral, ids[:1], steer, **GREEDY)[0])
    assert torch.equal(both[1, 3:], write(mixtral, ids[1:, 3:], steer, **GREEDY)[0])


def test_it_goes_with_other_steering(mixtral, ids):
    """The weak pass is the model otherwise steered alike: an expert that is off is off in both."""
    steer = bound(mixtral, ["scmoe:beta=1.5,alpha=0.01", {"steer": {"mote": {"off": {0: [0, 1, 2]}}}}])
    seen = []
    course = steer.start([1])
    with steer.blocks.on_route(lambda r, b: seen.append(r.experts_TK) if b.layer == 0 else None):
        write(mixtral, ids[:1], steer, **GREEDY)
    for ids_TK in seen:
        strong, weak = ids_TK.chunk(2)
        assert strong.shape[1] == 2 and (weak[:, 1:] == -1).all(), "the weak rows run one expert"
    assert not any(torch.isin(ids_TK, torch.tensor([0, 1, 2])).any() for ids_TK in seen)
    assert len(course.rows()) == 2


def test_weak_at_random(mixtral, ids):
    first = write(mixtral, ids[:1], bound(mixtral, Scmoe(2.0, 0.01, "random", seed=1)), **GREEDY)
    again = write(mixtral, ids[:1], bound(mixtral, Scmoe(2.0, 0.01, "random", seed=1)), **GREEDY)
    assert torch.equal(first, again)
    steers = [bound(mixtral, Scmoe(2.0, 0.01, "random", seed=seed)) for seed in (1, 2)]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    both = write(mixtral, ids, steers, attention_mask=mask, **GREEDY)
    assert torch.equal(both[0], first[0]), "neither the other row's draws nor padding matter"
    assert torch.equal(both[1, 3:], write(mixtral, ids[1:, 3:], steers[1], **GREEDY)[0])
    assert not torch.equal(first, write(mixtral, ids[:1], steers[1], **GREEDY))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": -1}, "beta"), ({"alpha": 0}, "alpha"), ({"weak": "best"}, "rank or random"), ({"rank": 9}, "1 to 8")],
)
def test_bad_input_is_named(mixtral, options, message):
    with pytest.raises(BadInput, match=message):
        bound(mixtral, Scmoe(**options))
