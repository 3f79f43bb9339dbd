"""Quantised banks against their twin: dequantise, then the naive reference."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import expert_mlp, expert_mlp_stored, quantize_bank

FORMATS = [(8, 64), (4, 32), (4, 64)]
ERROR = {8: 0.009, 4: 0.13}
"""Relative weight error of a Gaussian at each width: half a step over sqrt(3), a step being 4 to 5 sigma / levels."""


def bank(E=4, D=128, I=64, transposed=False):
    gate_up, down = torch.randn(E, 2 * I, D) / 8, torch.randn(E, D, I) / 8
    return (gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()) if transposed else (gate_up, down)


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 63, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_match_dequantised_reference(bits, group_size, tokens, transposed):
    gate_up, down = bank(transposed=transposed)
    quantized = quantize_bank(gate_up, down, bits, group_size, transposed=transposed)
    plain = [torch.stack(m) for m in zip(*(quantized.dequantize(e) for e in range(4)), strict=True)]
    x = torch.randn(tokens, 128)
    dispatch = Dispatch.of_slots(torch.randint(-1, 4, (tokens, 2)), torch.rand(tokens, 2), 4)
    got, want = expert_mlp_stored(x, dispatch, quantized), expert_mlp(x, dispatch, *plain, backend="reference")
    assert got.dtype == x.dtype
    assert (got - want).norm() <= 1e-2 * want.norm()  # activations are bf16


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_weight_error_is_that_of_the_width(bits, group_size):
    gate_up, down = bank()
    quantized = quantize_bank(gate_up, down, bits, group_size)
    for e in range(4):
        for got, want in zip(quantized.dequantize(e), (gate_up[e], down[e]), strict=True):
            error = ((got - want).norm() / want.norm()).item()
            assert ERROR[bits] / 4 < error < ERROR[bits]
    assert quantized.nbytes < (gate_up.nbytes + down.nbytes) * (bits + 2) / 32


def test_constant_and_zero_rows_survive():
    gate_up, down = torch.zeros(1, 32, 64), torch.full((1, 64, 32), 0.5)
    for bits in (8, 4):
        got_up, got_down = quantize_bank(gate_up, down, bits, 32).dequantize(0)
        assert torch.equal(got_up, gate_up[0])
        assert (got_down - 0.5).abs().max() < 0.01


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((torch.randn(1, 32, 48), torch.randn(1, 48, 16), 4, 32), "group"), ((*bank(), 3), "3 bits"), ((*bank(), 4, 48), "group")],
)
def test_what_cannot_be_quantised_says_so(arguments, words):
    with pytest.raises(BadInput, match=words):
        quantize_bank(*arguments)
