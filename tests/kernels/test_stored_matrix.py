"""A stored matrix times few and many rows: the compiled pass against the dequantised twin."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.kernels import few_rows, stored_matrix
from moesaic.kernels.low_bits import Packing
from moesaic.kernels.stored_matrix import StoredMatrix

PACKINGS = [None, Packing(8), Packing(8, 128), Packing(4), Packing(4, 32), Packing(2, 32), Packing(2, 128)]


def stored(outputs, width, packing):
    weight = torch.randn(outputs, width)
    if packing is None:
        return StoredMatrix(weight.bfloat16(), (outputs, width))
    return StoredMatrix.quantize(weight, packing)


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize(("outputs", "width"), [(4, 128), (68, 256), (1000, 384)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 33])
def test_equals_the_dequantised_matrix(packing, outputs, width, rows):
    matrix = stored(outputs, width, packing)
    x = torch.randn(rows, width).bfloat16()
    with torch.no_grad():
        got, want = matrix(x), linear(x.float(), matrix.dequantize().float())
    assert got.shape == (rows, outputs) and got.dtype is torch.bfloat16
    assert (got.float() - want).norm() <= 4e-3 * want.norm()


@pytest.mark.parametrize("packing", [Packing(8), Packing(4), Packing(2)], ids=str)
def test_widths_no_pass_can_take_and_other_dtypes(packing):
    matrix = stored(6, 40, packing)
    assert not matrix.suits
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 40).to(dtype)
        with torch.no_grad():
            want = linear(x, matrix.dequantize().to(dtype))
            torch.testing.assert_close(matrix(x), want)
    fit = stored(8, 256, packing)
    x = torch.randn(1, 256)
    with torch.no_grad():
        torch.testing.assert_close(fit(x), linear(x, fit.dequantize()))


def test_many_rows_in_pieces_are_the_same(monkeypatch):
    matrix, x = stored(100, 256, Packing(4)), torch.randn(9, 256).bfloat16()
    with torch.no_grad():
        whole = matrix(x)
        monkeypatch.setattr(stored_matrix, "WIDENED_BYTES", 7 * 512)
        torch.testing.assert_close(matrix(x), whole)


def test_gradients_flow_to_the_activations():
    matrix, x = stored(8, 256, Packing(8)), torch.randn(1, 256, requires_grad=True)
    matrix(x).sum().backward()
    torch.testing.assert_close(x.grad[0], matrix.dequantize().sum(0))


@pytest.mark.skipif(not few_rows.available(), reason="Numba is not installed")
@pytest.mark.parametrize("packing", [None, Packing(4)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_show(packing, value):
    x = torch.randn(1, 256).bfloat16()
    x[0, 3] = value
    with torch.no_grad():
        assert not stored(8, 256, packing)(x).isfinite().any()


def test_bad_input_says_what():
    with pytest.raises(BadInput, match="contiguous bf16"):
        StoredMatrix(torch.randn(4, 64), (4, 64))
    with pytest.raises(BadInput, match="contiguous bytes"):
        StoredMatrix(torch.zeros(3, dtype=torch.uint8), (4, 64), Packing(4))
    with pytest.raises(BadInput, match="not finite"):
        StoredMatrix.quantize(torch.full((4, 64), float("nan")), Packing(4))
