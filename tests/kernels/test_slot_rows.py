"""Rows gathered from slots, piece by piece in any order, against the naive twin: plain products, and Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moesaic.kernels import Weights, dispatch_slots, reference
from moesaic.kernels.in_order import InOrder, Piece
from moesaic.kernels.products import hit_spans
from moesaic.kernels.slot_rows import Plan, TorchRows, TritonRows
from moesaic.kernels.slots import bounds_of


def check(kind, T, E, K, D, I):
    torch.manual_seed(0)
    gate_up, down = torch.randn(E, 2 * I, D) / D**0.5, torch.randn(E, D, I) / I**0.5
    weights_TK, ids_TK = torch.rand(T, E).topk(K)
    x_TD, dispatch = torch.randn(T, D), dispatch_slots(ids_TK, weights_TK, E)
    want = reference.reference(x_TD, dispatch, Weights(gate_up, down))
    slot_E = torch.randperm(E + 3)[:E].tolist()  # experts lie anywhere, and some slots hold nothing
    held = Weights(torch.zeros(E + 3, 2 * I, D), torch.zeros(E + 3, D, I))
    held.gate_up[slot_E], held.down[slot_E] = gate_up, down
    pieces = [Piece(e, slot_E[e], start, end) for e, start, end in hit_spans(bounds_of(dispatch))]
    plan = Plan.of(dispatch, torch.device("cpu"))
    rows = TorchRows(x_TD, plan, held) if kind == "torch" else TritonRows(x_TD, plan, held, E)
    for part in (pieces[1::2], pieces[0::4], pieces[2::4]):
        if part:
            rows.add(part)
    assert torch.allclose(rows.finish(torch.float32), want, rtol=1e-4, atol=1e-5)
    call = InOrder(x_TD, dispatch, held)
    for piece in pieces:
        call.add([piece], held, lambda which, slot: (held.gate_up, held.down)[which][slot])
    assert torch.allclose(call.finish(torch.float32), want, rtol=1e-4, atol=1e-5)


SHAPES = [(1, 4, 2, 32, 16), (63, 3, 2, 48, 40), (130, 9, 3, 64, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_products_match_the_naive_twin(shape):
    check("torch", *shape)


def test_triton_matches_the_naive_twin_in_the_interpreter():
    pytest.importorskip("triton")
    here = os.path.dirname(__file__)
    code = (
        "import test_triton_interpreter as t; t.mend_interpreter(); import test_slot_rows as s\n"
        "for shape in s.SHAPES: s.check('triton', *shape)"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr[-2000:]
