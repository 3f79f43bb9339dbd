"""A single token's short way gives the bits of the long one, and stands aside where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesaic.kernels import dispatch_slots, few_rows
from moesaic.kernels.few_rows import available
from moesaic.serving.streamed import load_streamed
from moesaic.view import load
from moesaic.view.implementation import experts_forward, run

pytestmark = pytest.mark.skipif(not available(), reason="Numba is not installed")


@pytest.fixture
def small(monkeypatch):
    """Experts of any size take the compiled pass."""
    monkeypatch.setattr(few_rows, "LEAST_BYTES", 0)


@pytest.fixture
def used(monkeypatch):
    """Counts the short ways taken to their end."""
    taken, real = [], few_rows.one_token

    def watched(*given):
        made = real(*given)
        taken.append(made is not None)
        return made

    monkeypatch.setattr(few_rows, "one_token", watched)
    return taken


@pytest.fixture
def experts(small):
    return load("bundled").model.model.layers[1].mlp.experts


@pytest.mark.parametrize("ids", [[3, 9], [9, 3], [5], [0, 15, 7], [4, -1], [16, 2, 11]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bits_are_those_of_the_long_way(experts, used, ids, dtype):
    x, ids_1K = torch.randn(1, 192).bfloat16(), torch.tensor([ids])
    weights_1K = torch.rand(1, len(ids)).to(dtype)
    with torch.no_grad():
        got = experts_forward(experts, x, ids_1K, weights_1K)
        want = run(experts, x, dispatch_slots(ids_1K, weights_1K, 16))
    assert used == [True]
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)


def test_no_expert_at_all_gives_nothing(experts):
    with torch.no_grad():
        y = experts_forward(experts, torch.randn(1, 192).bfloat16(), torch.tensor([[-1, 16]]), torch.ones(1, 2))
    assert torch.equal(y, torch.zeros(1, 192, dtype=torch.bfloat16))


def test_an_expert_chosen_twice_goes_the_long_way(experts, used):
    x, ids_1K, weights_1K = torch.randn(1, 192).bfloat16(), torch.tensor([[3, 3]]), torch.rand(1, 2)
    with torch.no_grad():
        got = experts_forward(experts, x, ids_1K, weights_1K)
        assert torch.equal(got, run(experts, x, dispatch_slots(ids_1K, weights_1K, 16)))
    assert used == [False]


def test_replaced_weights_are_the_ones_that_count(experts):
    x, ids_1K, weights_1K = torch.randn(1, 192).bfloat16(), torch.tensor([[3, 4]]), torch.rand(1, 2)
    with torch.no_grad():
        before = experts_forward(experts, x, ids_1K, weights_1K)
        experts.down_proj = nn.Parameter(2 * experts.down_proj)
        after = experts_forward(experts, x, ids_1K, weights_1K)
        torch.testing.assert_close(after.float(), 2 * before.float(), rtol=2.0**-6, atol=1e-3)
        experts.down_proj = nn.Parameter(experts.down_proj.float())  # no longer what the pass reads
        experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.float())
        torch.testing.assert_close(experts_forward(experts, x, ids_1K, weights_1K).float(), after.float(), rtol=0.02, atol=0.02)


def test_gradients_and_autocast_go_the_long_way(experts, used):
    x, ids_1K, weights_1K = torch.randn(1, 192).bfloat16(), torch.tensor([[3, 4]]), torch.rand(1, 2)
    experts_forward(experts, x.requires_grad_(), ids_1K, weights_1K).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        experts_forward(experts, x, ids_1K, weights_1K)
    assert not used


def test_a_streamed_model_keeps_every_bit_of_it(small, used):
    resident = load("bundled").model
    with load_streamed("bundled", resident=0.4) as streamed, torch.inference_mode():
        caches = [model(torch.arange(9)[None], use_cache=True).past_key_values for model in (resident, streamed.model)]
        for token in range(20, 30):
            step = torch.tensor([[token]])
            one, two = (
                model(step, past_key_values=cache, use_cache=True).logits
                for model, cache in zip((resident, streamed.model), caches, strict=True)
            )
            assert torch.equal(one, two)
    assert used.count(True) == 10 * 6
