"""The compiled passes around the experts against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from moesaic.kernels.few_rows import available
from moesaic.kernels.linear import few_rows_linear, few_rows_norm

needs_numba = pytest.mark.skipif(not available(), reason="Numba is not installed")


def close(got, want):
    """Within the rounding of two bf16 numbers, which sums in another order may end in."""
    torch.testing.assert_close(got.float(), want.float(), rtol=2.0**-7, atol=1e-2)


@needs_numba
@pytest.mark.parametrize("shape", [(1, 32), (1, 1, 96), (2, 64), (3, 160), (1, 4, 1024), (4, 224)])
@pytest.mark.parametrize("outputs", [1, 7, 16, 67])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_torchs(shape, outputs, biased, monkeypatch):
    x, weight = torch.randn(shape).bfloat16(), torch.randn(outputs, shape[-1]).bfloat16()
    bias = torch.randn(outputs).bfloat16() if biased else None
    monkeypatch.setattr("moesaic.kernels.linear.linear", lambda *given: pytest.fail("the compiled pass was not used"))
    with torch.no_grad():
        got = few_rows_linear(x, weight, bias)
    assert got.shape == (*shape[:-1], outputs) and got.dtype == torch.bfloat16
    want = linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(got.double(), want, rtol=2.0**-6, atol=2.0**-6 * want.abs().max().item())


@needs_numba
def test_linear_rows_do_not_depend_on_their_neighbours_nor_on_threads():
    x, weight = torch.randn(4, 96).bfloat16(), torch.randn(33, 96).bfloat16()
    threads = torch.get_num_threads()
    with torch.no_grad():
        together = few_rows_linear(x, weight)
        assert all(torch.equal(together[i : i + 1], few_rows_linear(x[i : i + 1], weight)) for i in range(4))
        try:
            torch.set_num_threads(2)
            assert torch.equal(together, few_rows_linear(x, weight))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(5, 64).bfloat16(), torch.randn(8, 64).bfloat16()),  # more rows
        (torch.randn(1, 40).bfloat16(), torch.randn(8, 40).bfloat16()),  # no whole lines
        (torch.randn(1, 64), torch.randn(8, 64)),  # another dtype
        (torch.randn(1, 64).bfloat16(), torch.randn(64, 8).bfloat16().T),  # not contiguous
        (torch.randn(0, 64).bfloat16(), torch.randn(8, 64).bfloat16()),  # nothing
    ],
)
def test_linear_leaves_to_torch_what_it_does_not_suit(x, weight):
    with torch.no_grad():
        assert torch.equal(few_rows_linear(x, weight), linear(x, weight))


def test_linear_keeps_gradients():
    x, weight = torch.randn(1, 64).bfloat16().requires_grad_(), torch.randn(8, 64).bfloat16().requires_grad_()
    few_rows_linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None


@needs_numba
@pytest.mark.parametrize("shape", [(1, 1, 33), (2, 3, 64), (1, 16, 5, 48)])
def test_norm_rounds_where_the_modules_of_transformers_do(shape):
    x, weight = 3 * torch.randn(shape).bfloat16(), torch.randn(shape[-1]).bfloat16()
    with torch.no_grad():
        got = few_rows_norm(x, weight, 1e-6)
    wide = x.float()
    want = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
    close(got, want)
    assert few_rows_norm(x.float(), weight, 1e-6) is None
    assert few_rows_norm(x.requires_grad_(), weight, 1e-6) is None
