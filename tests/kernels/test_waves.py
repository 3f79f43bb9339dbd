"""Experts in parts give the very bits of the stacked bank: in every dtype and form, however the parts fall."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.kernels import Form, Weights, dispatch_slots, few_rows, waves
from moesaic.kernels.cpu import best

FORMS = {
    "swiglu": {},
    "plain": {"gated": False, "act": "relu2"},
    "biased": {"biased": True},
    "own gate": {"apply_gate": lambda h: h[:, ::2].clamp(max=2) * h[:, 1::2].tanh()},
    "normed": {"post": lambda y: y / y.norm(dim=-1, keepdim=True)},
}


def bank(E, D, I, dtype, gated=True, biased=False, transposed=False, **form):
    H = 2 * I if gated else I
    shapes = ((E, D, H), (E, I, D)) if transposed else ((E, H, D), (E, D, I))
    made = [torch.randn(*shape).mul(D**-0.5).to(dtype) for shape in shapes]
    if biased:
        form |= {"gate_up_bias_EH": torch.randn(E, H).to(dtype), "down_bias_ED": torch.randn(E, D).to(dtype)}
    return Weights(*made, Form(gated=gated, **form), transposed)


class Cache:
    """`room` slots in another order than the experts; each part holds as many experts as a random draw says."""

    def __init__(self, weights, room):
        self.weights, self.room, self.asked = weights, room, []
        slots = [torch.full((room, *t.shape[1:]), float("nan"), dtype=t.dtype) for t in (weights.gate_up, weights.down)]
        self.slots = Weights(*slots, weights.form, weights.transposed)

    def __call__(self, spans, matrix):
        self.asked.append(matrix)
        rest = list(spans)
        while rest:
            part, rest = rest[: (n := int(torch.randint(1, self.room + 1, ())))], rest[n:]
            where = torch.randperm(self.room)[: len(part)].tolist()
            for held, tensor in enumerate((self.weights.gate_up, self.weights.down)):
                slot = (self.slots.gate_up, self.slots.down)[held]
                slot.fill_(float("nan"))
                if matrix in (None, held):
                    for at, (e, _, _) in zip(where, part, strict=True):
                        slot[at] = tensor[e]
            yield [(at, start, end) for at, (_, start, end) in zip(where, part, strict=True)]


def same(weights, T, K, room):
    E = weights.num_experts
    x = torch.randn(T, weights.model_width).to(weights.gate_up.dtype)
    ids = torch.rand(T, E).argsort(1)[:, :K]
    ids[torch.rand(T, K) < 0.1] = -1
    dispatch = dispatch_slots(ids, torch.rand(T, K), E)
    cache = Cache(weights, room)
    with torch.no_grad():
        assert torch.equal(waves.run(x, dispatch, cache.slots, cache), best(x, dispatch, weights))
    return cache.asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_every_form(dtype, form, transposed):
    weights = bank(6, 48, 32, dtype, transposed=transposed, **FORMS[form])
    for T, K in ((1, 2), (7, 3), (63, 2)):
        for room in (1, 3):
            assert None not in same(weights, T, K, room)


@pytest.mark.parametrize("T", [1, 3, 40, 300], ids="T{}".format)
def test_the_compiled_passes(T):
    """Large enough for Numba's passes, where it is installed: few rows and many rows, and parts that would alone choose
    the other one."""
    weights = bank(8, 512, 256, torch.bfloat16)
    for room in (1, 2, 8):
        asked = same(weights, T, 2, room)
        if few_rows.available() and T == 1:
            assert asked
            assert set(asked) == {None}


def test_blocks_of_pairs():
    """More pairs than one block: activations run on the same blocks, so that vector and tail fall alike."""
    same(bank(9, 40, 24, torch.float32), 700, 2, 2)
    same(bank(9, 40, 24, torch.bfloat16), 700, 2, 2)


def test_no_pairs_and_no_gradients():
    weights = bank(3, 16, 8, torch.float32)
    x = torch.randn(2, 16)
    empty = dispatch_slots(torch.full((2, 1), -1), torch.ones(2, 1), 3)
    assert torch.equal(waves.run(x, empty, weights, Cache(weights, 1)), torch.zeros(2, 16))
    with pytest.raises(BadInput, match="no backward"):
        waves.run(x.requires_grad_(), empty, weights, Cache(weights, 1))
