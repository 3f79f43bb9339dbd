"""The short-sequence attention against its naive twin, and inside a stock model."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moesaic.training import attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
"""Relative, on the norm: the probabilities are kept in the working dtype."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "length"), [(6, 2, 63), (4, 4, 2), (2, 1, 300), (3, 3, 256)])
def test_equals_the_naive_twin(dtype, heads, key_heads, length):
    torch.manual_seed(length)
    inputs = [torch.randn(2, h, length, 16).to(dtype).requires_grad_() for h in (heads, key_heads, key_heads)]
    grad = torch.randn(2, heads, length, 16).to(dtype)
    twin = attention.reference(*inputs, 0.3)
    ours = attention.short_attention(*inputs, 0.3).transpose(1, 2)
    pairs = zip([ours, *torch.autograd.grad(ours, inputs, grad)], [twin, *torch.autograd.grad(twin, inputs, grad)], strict=True)
    for found, expected in pairs:
        assert found.dtype == dtype
        assert (found - expected).float().norm() <= TOLERANCE[dtype] * expected.float().norm()


@pytest.mark.parametrize("masked", [False, True])
def test_a_stock_model_gives_the_same_logits(masked, monkeypatch):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids = torch.randint(50, (2, 40))
    mask = torch.ones_like(ids)
    if masked:
        mask[0, :7] = 0
    calls = []
    real = attention.short_attention
    monkeypatch.setattr(attention, "short_attention", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation(attention.install())
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert len(calls) == (0 if masked else 2), "padding must go to sdpa, whole sequences to ours"
