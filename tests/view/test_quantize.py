"""Quantised experts behind the experts call: every convention against a model that holds the dequantised weights."""

from __future__ import annotations

import copy

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.view.quantize import Recipe, bits_by_importance, chosen_counts, parse, quantize_model


def dequantised(model, made):
    """The model with the weights that the banks stand for, as the architecture stores them."""
    twin = copy.deepcopy(model)
    for block, bank in zip(moesaic.view(twin), made.banks, strict=True):
        names = ("gate_up_proj" if block.bank.gated else "up_proj", "down_proj")
        for e in range(block.num_experts):
            for name, weight in zip(names, bank.dequantize(e), strict=True):
                getattr(block.experts, name).data[e] = weight.T if block.bank.transposed else weight
    return twin


@pytest.mark.parametrize("recipe", ["int4:group=32", "mixed:high=8,low=2,share=0.5"])
def test_logits_equal_those_of_the_dequantised_weights(model, ids, logits, recipe):
    model.set_experts_implementation("moesaic")
    plain, original = logits(model, ids), copy.deepcopy(model)
    importance = [torch.rand(block.num_experts) for block in moesaic.view(model)]
    made = quantize_model(model, recipe, importance)
    want = logits(dequantised(original, made), ids)
    got = logits(model, ids)
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert (got - plain).norm() > 10 * (got - want).norm()
    if recipe.startswith("mixed"):
        assert {bits for layer in made.bits for bits in layer} == {8, 2}
    assert made.nbytes < made.stored_bytes
    assert all(block.experts.down_proj.is_meta for block in moesaic.view(model))


def test_decoding_a_token_at_a_time(qwen, ids):
    qwen.set_experts_implementation("moesaic")
    original = copy.deepcopy(qwen)
    twin = dequantised(original, quantize_model(qwen, "int8:group=32"))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(qwen.generate(ids, **options), twin.generate(ids, **options))


def test_the_least_important_over_all_layers_get_fewer_bits():
    importance = [torch.tensor([5.0, 1.0]), torch.tensor([2.0, 9.0, 1.0])]
    assert bits_by_importance(importance, Recipe(4, 2, 0.4)) == [[4, 2], [4, 4, 2]]
    assert bits_by_importance(importance, Recipe(4, 2, 0.0)) == [[4, 4], [4, 4, 4]]
    assert bits_by_importance(importance, Recipe(4, 2, 1.0)) == [[2, 2], [2, 2, 2]]


def test_counts_are_the_choices_of_the_router(qwen, ids, logits):
    blocks, seen = moesaic.view(qwen), {}
    counts, handles = chosen_counts(blocks)
    with blocks.on_route(lambda routing, block: seen.setdefault(block.name, []).append(routing.experts_TK)):
        logits(qwen, ids)
    for block, counted in zip(blocks, counts, strict=True):
        want = torch.cat(seen[block.name]).flatten().bincount(minlength=block.num_experts)
        assert torch.equal(counted, want.double())
    for handle in handles:
        handle.remove()
    before = [counted.clone() for counted in counts]
    logits(qwen, ids)
    assert all(torch.equal(*pair) for pair in zip(before, counts, strict=True))


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("int4", Recipe(4, 4, 0, 64)),
        ("int8:group=128", Recipe(8, 8, 0, 128)),
        ("mixed", Recipe(4, 2, 0.25, 64)),
        ("mixed:high=8,low=4,share=0.5,group=32", Recipe(8, 4, 0.5, 32)),
    ],
)
def test_recipes(text, recipe):
    assert parse(text) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int5", "one of int8, int4, int2, mixed"),
        ("int4:high=8", "int4 has no option 'high=8'; it knows group, linear"),
        ("int4:group", "int4 has no option 'group'"),
        ("int4:group=48", "groups of 48 inputs"),
        ("mixed:share=2", "a share from 0 to 1"),
        ("mixed:high=2,low=8", "low at most high"),
        ("mixed:share=some", "could not convert"),
    ],
)
def test_recipes_that_are_none(text, words):
    with pytest.raises(BadInput, match=words):
        parse(text)


def test_what_cannot_be_replaced_is_left_whole(qwen, ids, logits):
    with pytest.raises(BadInput, match='experts_implementation="moesaic"'):
        quantize_model(qwen)
    qwen.set_experts_implementation("moesaic")
    before = logits(qwen, ids)
    with pytest.raises(BadInput, match="mixed widths need an importance"):
        quantize_model(qwen, "mixed")
    with pytest.raises(BadInput, match="the importance is of"):
        quantize_model(qwen, "mixed", [torch.ones(3)])
    assert torch.equal(logits(qwen, ids), before)


def test_reading_a_replaced_expert_says_why(qwen):
    qwen.set_experts_implementation("moesaic")
    quantize_model(qwen, "int8")
    with pytest.raises(BadInput, match="meta device"):
        moesaic.view(qwen)[0].bank[0]


def test_linear_layers_too(qwen, ids, logits):
    qwen.set_experts_implementation("moesaic")
    original = copy.deepcopy(qwen)
    made = quantize_model(qwen, "int8:group=32,linear=8")
    assert made.linears is not None
    layers = qwen.config.num_hidden_layers
    assert made.linears["layers"] == 4 * layers + 1
    assert made.linears["nbytes"] < made.linears["stored_bytes"]
    twin = dequantised(original, made)
    for name, module in qwen.named_modules():
        if hasattr(module, "stored"):
            assert module.weight.is_meta
            twin.get_submodule(name).weight = torch.nn.Parameter(module.stored.dequantize())
    assert (logits(qwen, ids) - logits(twin, ids)).norm() <= 1e-4 * logits(twin, ids).norm()


def test_a_weight_that_is_not_finite_leaves_the_model_whole(qwen):
    qwen.set_experts_implementation("moesaic")
    with torch.no_grad():
        qwen.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        quantize_model(qwen, "int4:linear=4")
    assert not any(weight.is_meta for weight in qwen.parameters())
