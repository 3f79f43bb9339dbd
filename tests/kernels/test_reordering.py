"""Card: layers-and-balancing.md, "M3ViT (computation reordering)": expert by expert, in two buffers (waves.py)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from moesaic.kernels import Form, Weights, dispatch_slots, waves
from moesaic.kernels.cpu import best


class TwoBuffers:
    """Loads the next expert into the other buffer before the current one is computed; counts loads and what is held."""

    def __init__(self, weights):
        self.weights, self.loads, self.held, self.most = weights, [], set(), 0
        parts = [torch.full((2, *t.shape[1:]), float("nan"), dtype=t.dtype) for t in (weights.gate_up, weights.down)]
        self.slots = Weights(*parts, weights.form, weights.transposed)

    def load(self, e, buffer):
        self.loads.append(e)
        self.held.add(e)
        self.most = max(self.most, len(self.held))
        self.slots.gate_up[buffer], self.slots.down[buffer] = self.weights.gate_up[e], self.weights.down[e]

    def __call__(self, spans, matrix):
        self.load(spans[0][0], 0)
        for i, (e, start, end) in enumerate(spans):
            if i + 1 < len(spans):
                self.load(spans[i + 1][0], (i + 1) % 2)
            yield [(i % 2, start, end)]
            self.held.discard(e)


def case(T, K, E, seed=0):
    torch.manual_seed(seed)
    weights = Weights(torch.randn(E, 32, 16) / 4, torch.randn(E, 16, 16) / 4, Form())
    x, ids, w = torch.randn(T, 16), torch.rand(T, E).argsort(1)[:, :K], torch.rand(T, K)
    return weights, x, ids, w


def token_by_token(weights, x, ids, w):
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, weight in zip(ids[t], w[t], strict=True):
            gate, up = (weights.gate_up[e] @ x[t]).chunk(2)
            y[t] += weight * (weights.down[e] @ (silu(gate) * up))
    return y


@pytest.mark.parametrize(("T", "K", "E"), [(1, 2, 8), (3, 2, 64), (40, 4, 16)])
def test_queues_equal_token_order_and_the_resident_kernel_to_the_bit(T, K, E):
    weights, x, ids, w = case(T, K, E)
    buffers, dispatch = TwoBuffers(weights), dispatch_slots(ids, w, E)
    with torch.no_grad():
        y = waves.run(x, dispatch, buffers.slots, buffers)
        assert torch.equal(y, best(x, dispatch, weights)), "sums run in the order of experts"
    torch.testing.assert_close(y, token_by_token(weights, x, ids, w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("T", "K", "E"), [(1, 2, 8), (3, 2, 64), (40, 4, 16), (40, 4, 200)])
def test_one_load_per_expert_that_anybody_chose_and_two_buffers_for_any_number(T, K, E):
    weights, x, ids, w = case(T, K, E)
    buffers = TwoBuffers(weights)
    with torch.no_grad():
        waves.run(x, dispatch_slots(ids, w, E), buffers.slots, buffers)
    distinct = sorted(set(ids.flatten().tolist()))
    assert len(distinct) <= min(E, T * K)
    passes = len(buffers.loads) // len(distinct)
    assert buffers.loads == distinct * passes, "an empty queue is never loaded"
    assert passes <= 2 and buffers.most <= 2, "at most once for each of an expert's two matrices"
