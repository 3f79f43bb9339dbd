"""The chunked loss against its naive twin, and the probe that decides which models may use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from moesaic.training.loss import linear_cross_entropy, plain_head, reference

SMALL = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
"""Relative, on the norm: bf16 rounds each product to 8 bits, in another order than the twin."""


def run(loss, hidden, weight, target, *args):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(hidden, weight, target, *args)
    (3 * value).backward()
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocab", "chunk"), [(1, 3, 8), (63, 1000, 16), (64, 257, 64), (1000, 90, 333)])
def test_equals_the_naive_twin(dtype, tokens, vocab, chunk):
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 24).to(dtype), torch.randn(vocab, 24) * 0.3
    target = torch.randint(vocab, (tokens,))
    for ours, twin in zip(
        run(linear_cross_entropy, hidden, weight, target, chunk), run(reference, hidden, weight, target), strict=True
    ):
        assert ours.dtype == twin.dtype
        assert (ours - twin).float().norm() <= TOLERANCE[dtype] * twin.float().norm()


def test_a_target_that_is_almost_impossible_costs_its_true_price():
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[200.0], [0.0], [199.0]])
    target = torch.tensor([1, 0])
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target), reference(hidden, weight, target))


def test_without_gradient_it_only_counts():
    hidden, weight, target = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4), torch.randint(7, (9,))
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, target, 4)
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(hidden, weight, target).detach())


def test_the_probe_takes_a_plain_head_and_leaves_the_random_state():
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL)).train()
    before = torch.get_rng_state()
    decoder, head = plain_head(model)
    assert decoder is model.model
    assert head is model.lm_head
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_the_probe_refuses_softcapped_logits_and_a_bias():
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=0.05))
    assert plain_head(capped) is None
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    model.lm_head = nn.Linear(16, 90)
    assert plain_head(model) is None
