"""The compiled pass for a few rows per expert against the naive twin in fp32."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows, many_rows
from moesaic.kernels.cpu import cpu
from moesaic.kernels.products import hit_spans
from moesaic.kernels.reference import reference
from moesaic.kernels.weights import Form, Weights

pytestmark = pytest.mark.skipif(not few_rows.available(), reason="numba is not installed (the `cpu` extra)")


def bank(E=8, D=512, I=256, dtype=torch.bfloat16):
    return Weights((torch.randn(E, 2 * I, D) * D**-0.5).to(dtype), (torch.randn(E, D, I) * I**-0.5).to(dtype), Form())


def routed(ids, E=8):
    return Dispatch.of_slots(torch.tensor(ids), torch.rand(len(ids), len(ids[0])), E)


CASES = {
    "one token": [[5, 2]],
    "one slot": [[3]],
    "same expert twice": [[4, 4]],
    "few tokens": [[0, 7], [7, 3], [1, 2], [0, 6], [5, 7]],
    "empty slots": [[-1, 2], [9, -1], [-1, -1], [2, 0]],
    "all on one expert": [[6], [6], [6], [6]],
}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_the_naive_twin(name, monkeypatch):
    monkeypatch.setattr(many_rows, "available", lambda: False)  # which would take most of these where it can
    weights, dispatch = bank(), routed(CASES[name])
    x = torch.randn(dispatch.tokens, 512).bfloat16()
    spans = hit_spans(dispatch.offsets_E1.tolist())
    assert few_rows.fits(weights, torch.bfloat16, spans)
    y = few_rows.run(x, dispatch, weights, spans)
    wide = Weights(weights.gate_up.float(), weights.down.float(), Form())
    want = reference(x.float(), dispatch, wide)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() <= 3e-3 * want.norm()  # bf16 rounding of the result alone
    assert torch.equal(y, few_rows.run(x, dispatch, weights, spans))
    assert torch.equal(y, cpu(x, dispatch, weights))


def test_changed_weights_are_seen_at_once():
    weights, dispatch, x = bank(), routed([[1, 2]]), torch.randn(1, 512).bfloat16()
    before = cpu(x, dispatch, weights)
    weights.down.data[1:3] *= 2
    torch.testing.assert_close(cpu(x, dispatch, weights).float(), 2 * before.float(), rtol=1e-2, atol=1e-3)


def test_what_it_does_not_compute_goes_elsewhere():
    spans = [(0, 0, 1)]
    fits = lambda weights, spans=spans, dtype=torch.bfloat16: few_rows.fits(weights, dtype, spans)  # noqa: E731
    good = bank()
    assert fits(good)
    assert not fits(good, [(0, 0, 5)])  # more rows than it is fast for
    assert not fits(bank(dtype=torch.float32), dtype=torch.float32)
    assert not fits(bank(D=64, I=32))  # cache-sized experts
    assert not fits(Weights(good.gate_up, good.down, Form(act="gelu")))
    assert not fits(Weights(good.gate_up, good.down, Form(down_bias_ED=torch.zeros(8, 512))))
    assert not fits(Weights(good.gate_up.transpose(1, 2), good.down.transpose(1, 2), Form(), transposed=True))
