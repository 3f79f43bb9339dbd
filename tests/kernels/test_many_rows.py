"""The compiled pass for many rows per expert against the naive twin in fp32."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, relative_error

from moesaic.core.routing import Dispatch
from moesaic.kernels import expert_mlp, explain, few_rows, many_back, many_rows
from moesaic.kernels.cpu import cpu
from moesaic.kernels.products import hit_spans
from moesaic.kernels.reference import reference
from moesaic.kernels.weights import Form, Weights

pytestmark = pytest.mark.skipif(not many_rows.available(), reason="needs numba and AVX-512 BF16 without AMX")

WIDTH, INNER = 544, 288
"""Multiples of 32, as the pass needs, but not of the 64 output columns that it finishes at a time."""


def bank(E=64, D=WIDTH, I=INNER, dtype=torch.bfloat16):
    return Weights((torch.randn(E, 2 * I, D) * D**-0.5).to(dtype), (torch.randn(E, D, I) * I**-0.5).to(dtype), Form())


def routed(experts_TK, E=64):
    return Dispatch.of_slots(experts_TK, torch.rand(experts_TK.shape), E)


def spread(T, E, K):
    return torch.rand(T, E).topk(K).indices


def spans_of(dispatch):
    return hit_spans(dispatch.offsets_E1.tolist())


def twin(x_TD, dispatch, weights):
    return reference(x_TD.float(), dispatch, Weights(weights.gate_up.float(), weights.down.float(), Form()))


def close(y_TD, want_TD):
    return (y_TD.float() - want_TD).norm() <= 4e-3 * want_TD.norm()  # bf16 rounding of the inner rows and of the result


CASES = {
    "one token": lambda: spread(1, 64, 8),
    "63 tokens": lambda: spread(63, 64, 8),
    "63 tokens, 3 experts": lambda: spread(63, 3, 2),
    "1000 tokens": lambda: spread(1000, 64, 8),
    "1000 tokens, 3 experts": lambda: spread(1000, 3, 2),
    "all on one expert": lambda: torch.full((1000, 1), 2),
    "same expert twice": lambda: torch.full((20, 2), 1),
    "half of the experts empty": lambda: spread(200, 32, 4) * 2,
    "empty slots": lambda: torch.randint(-1, 65, (200, 3)),
    "every number of rows": lambda: torch.arange(64).repeat_interleave(torch.arange(64)).unsqueeze(1),
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_naive_twin(name):
    dispatch, weights = routed(CASES[name]()), bank()
    x = torch.randn(dispatch.tokens, WIDTH).bfloat16()
    y = many_rows.run(x, dispatch, weights, spans_of(dispatch))
    assert y.dtype == torch.bfloat16
    assert close(y, twin(x, dispatch, weights))
    if many_rows.fits(weights, torch.bfloat16, spans_of(dispatch)):
        assert torch.equal(y, cpu(x, dispatch, weights))
    else:
        assert name == "one token"


def test_same_bits_for_any_number_of_cores_and_rounds(monkeypatch):
    dispatch, weights, x = routed(spread(300, 64, 8)), bank(), torch.randn(300, WIDTH).bfloat16()
    want = many_rows.run(x, dispatch, weights, spans_of(dispatch))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(many_rows.run(x, dispatch, weights, spans_of(dispatch)), want)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(many_rows, "PIECE_BYTES", 1)  # pieces of 24 rows
    monkeypatch.setattr(many_rows, "SCRATCH_BYTES", 1 << 20)
    assert torch.equal(many_rows.run(x, dispatch, weights, spans_of(dispatch)), want)


TRAINED = {
    "63 tokens": ({"T": 63}, False),
    "1000 tokens, one slot": ({"T": 1000, "K": 1}, False),
    "half of the experts empty": ({"T": 100, "E": 16, "routing": "half the experts"}, False),
    "one expert": ({"routing": "one expert"}, False),
    "empty slots": ({"routing": "empty slots"}, False),
    "in rounds": ({"T": 130, "E": 16, "K": 4}, True),
}


def count_calls(monkeypatch, module, name):
    seen, real = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: seen.append(1) or real(*given))
    return seen


@pytest.mark.parametrize("name", TRAINED)
def test_training_gets_the_gradients_of_the_twin(name, monkeypatch):
    shape, in_rounds = TRAINED[name]
    forward, backward = count_calls(monkeypatch, many_rows, "forward"), count_calls(monkeypatch, many_back, "backward")
    if in_rounds:
        monkeypatch.setattr(many_back, "ROUND_BYTES", 1 << 20)
        monkeypatch.setattr(many_rows, "SCRATCH_BYTES", 1 << 20)
    case = Case(D=WIDTH, I=INNER, dtype=torch.bfloat16, **shape)
    want, got = case.run("reference"), case.run("torch")
    assert forward and backward
    for leaf, tensor in want.items():
        assert got[leaf].dtype == tensor.dtype
        assert relative_error(got[leaf], tensor) <= 1e-2, leaf
    again = case.run("torch")
    assert all(torch.equal(got[leaf], again[leaf]) for leaf in got)


def test_gradients_that_are_not_wanted_go_the_other_way(monkeypatch):
    backward = count_calls(monkeypatch, many_back, "backward")
    weights, dispatch = bank(E=3), routed(spread(63, 3, 2), E=3)
    x = torch.randn(63, WIDTH).bfloat16().requires_grad_()
    grads = [
        torch.autograd.grad(expert_mlp(x, dispatch, weights.gate_up, weights.down, backend=b).float().sum(), x)[0]
        for b in ("torch", "reference")
    ]
    assert relative_error(*grads) <= 1e-2
    assert not backward


def test_gates_far_from_zero():
    weights, dispatch = bank(E=3), routed(spread(63, 3, 2), E=3)
    x = 300 * torch.randn(63, WIDTH).bfloat16()
    assert close(cpu(x, dispatch, weights), twin(x, dispatch, weights))
    x[5] = float("nan")
    y = cpu(x, dispatch, weights)
    assert y[5].isnan().all() and y[:5].isfinite().all() and y[6:].isfinite().all()


def test_unhit_experts_are_never_read():
    weights, dispatch = bank(E=4), routed(torch.tensor([[0, 2]] * 40), E=4)
    weights.gate_up[1::2], weights.down[1::2] = float("nan"), float("nan")
    assert cpu(torch.randn(40, WIDTH).bfloat16(), dispatch, weights).isfinite().all()


def test_changed_weights_are_seen_at_once():
    weights, dispatch, x = bank(E=3), routed(spread(63, 3, 2), E=3), torch.randn(63, WIDTH).bfloat16()
    before = cpu(x, dispatch, weights)
    weights.down.data[:] *= 2
    torch.testing.assert_close(cpu(x, dispatch, weights).float(), 2 * before.float(), rtol=1e-2, atol=1e-3)


def test_a_result_is_not_overwritten_by_the_next():
    weights, dispatch, x = bank(E=3), routed(spread(63, 3, 2), E=3), torch.randn(63, WIDTH)
    first = cpu(x, dispatch, weights)
    kept = first.clone()
    cpu(2 * x, dispatch, weights)
    assert first.dtype == torch.float32 and torch.equal(first, kept)


@pytest.mark.parametrize(("D", "I"), [(520, 288), (544, 264), (513, 257)])
def test_sizes_that_it_cannot_take_go_elsewhere(D, I):
    weights, dispatch, x = bank(3, D, I), routed(spread(63, 3, 2), E=3), torch.randn(63, D).bfloat16()
    assert not many_rows.fits(weights, torch.bfloat16, spans_of(dispatch))
    got, want = cpu(x, dispatch, weights), twin(x, dispatch, weights)
    assert (got.float() - want).norm() <= 1e-2 * want.norm()


def test_it_is_chosen_where_it_is_fast_and_says_so(monkeypatch):
    good, many, few = bank(E=3), [(0, 0, 8), (2, 8, 16)], [(0, 0, 1), (2, 1, 3)]
    assert many_rows.fits(good, torch.bfloat16, many)
    assert not many_rows.fits(good, torch.bfloat16, few)
    assert not many_rows.fits(bank(E=3, D=64, I=32), torch.bfloat16, many)  # cache-sized experts
    assert not many_rows.fits(bank(E=3, dtype=torch.float32), torch.float32, many)
    assert not many_rows.fits(Weights(good.gate_up, good.down, Form(act="gelu")), torch.bfloat16, many)
    assert "as stored" in explain(good) and "budget" not in explain(good)
    monkeypatch.setattr(many_rows, "available", lambda: False)
    assert not many_rows.fits(good, torch.bfloat16, many)
    assert few_rows.fits(good, torch.bfloat16, many[:1]) == (many[0][2] <= few_rows.MOST_ROWS)
