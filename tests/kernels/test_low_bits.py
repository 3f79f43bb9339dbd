"""The stored form of 8, 4 and 2 bits: codes and bytes exact, errors those of the width, the same bytes on every machine."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.kernels import Packing, dequantize_matrix, parts, quantize_matrix, record_bytes
from moesaic.kernels.low_bits import GROUP_SIZES, LEVELS, open_record, pack_codes, unpack_codes

PACKINGS = [Packing(bits, size) for bits in LEVELS for size in GROUP_SIZES]
SHAPES = [(1, 32), (7, 64), (5, 192), (3, 1000), (65, 1408)]
ERROR = {8: 0.0068, 4: 0.105, 2: 0.37}
"""Largest relative RMS error of Gaussian weights in groups of 128; smaller groups have less."""


def each(pairs):
    return pytest.mark.parametrize(("packing", "shape"), pairs, ids=lambda value: str(value).replace(" ", ""))


every = each([(packing, shape) for packing in PACKINGS for shape in SHAPES])


@pytest.mark.parametrize("bits", LEVELS)
def test_every_code_survives_packing(bits):
    codes = torch.randint(0, 2**bits, (9, 64), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (9, 64 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_the_leftmost_weight_is_in_the_lowest_bits():
    assert pack_codes(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00111001]]
    assert pack_codes(torch.tensor([[0xA, 0x5]], dtype=torch.uint8), 4).tolist() == [[0x5A]]


@every
def test_parts_lie_one_after_another_on_whole_lines(packing, shape):
    codes, scale = parts(packing, shape)
    assert (codes.name, scale.name) == ("codes", "scale")
    assert codes.nbytes == shape[0] * shape[1] * packing.bits // 8
    assert scale.shape == (shape[0], -(-shape[1] // packing.group_size))
    size = record_bytes(packing, shape)
    assert size % 64 == 0
    assert codes.nbytes + scale.nbytes <= size < codes.nbytes + scale.nbytes + 128
    record = torch.zeros(size, dtype=torch.uint8)
    held = open_record(record, packing, shape)
    assert [(h.dtype, tuple(h.shape)) for h in held] == [(p.dtype, p.shape) for p in (codes, scale)]
    assert all((h.data_ptr() - record.data_ptr()) % 64 == 0 for h in held)


@every
def test_a_weight_is_its_level_times_its_groups_scale(packing, shape):
    record = quantize_matrix(torch.randn(shape), packing)
    codes, scale = open_record(record, packing, shape)
    codes, (step, first) = unpack_codes(codes, packing.bits), LEVELS[packing.bits]
    got = dequantize_matrix(record, packing, shape)
    for row, column in ((0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 2)):
        level = step * int(codes[row, column]) + first
        assert float(got[row, column]) == level * float(scale[row, column // packing.group_size])


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_that_of_the_width(packing, dtype):
    weight = torch.randn(64, 512).to(dtype)
    error = (dequantize_matrix(quantize_matrix(weight, packing), packing, (64, 512)) - weight).norm() / weight.norm()
    assert ERROR[packing.bits] / 2 < float(error) < ERROR[packing.bits]


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_search_never_loses_to_the_largest_weight(packing):
    """Against the scale that just reaches the largest weight of each group, rounded to bf16."""
    weight = torch.randn(16, 256) * torch.rand(16, 1) ** 4
    got = dequantize_matrix(quantize_matrix(weight, packing), packing, (16, 256))
    grouped = weight.unflatten(1, (-1, packing.group_size))
    step, first = LEVELS[packing.bits]
    most = step * (2**packing.bits - 1) + first
    scale = (grouped.abs().amax(2, keepdim=True) / most).bfloat16().float()
    plain = ((grouped / scale - first) / step).round().clamp(0, 2**packing.bits - 1) * step + first
    worst = (plain * scale - grouped).square().sum(2)
    assert ((got - weight).unflatten(1, (-1, packing.group_size)).square().sum(2).sum() < worst.sum()).all()


def test_eight_bits_round_to_half_a_step():
    weight = torch.randn(8, 256)
    packing = Packing(8, 128)
    record = quantize_matrix(weight, packing)
    scale = open_record(record, packing, (8, 256))[1].float().abs().repeat_interleave(128, 1)
    # bf16 scales may fall short of the largest weight by 2^-9 of it, which is a quarter of a step.
    assert ((dequantize_matrix(record, packing, (8, 256)) - weight).abs() <= 0.76 * scale).all()


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_second_pass_changes_little(packing):
    """Weights that are levels times a scale already; their scale is searched again, hence not nothing."""
    once = dequantize_matrix(quantize_matrix(torch.randn(8, 192), packing), packing, (8, 192))
    again = dequantize_matrix(quantize_matrix(once, packing), packing, (8, 192))
    assert float((again - once).norm() / once.norm()) < ERROR[packing.bits] / 10


def test_zeros_and_tiny_weights_and_constants():
    for bits in LEVELS:
        packing = Packing(bits, 32)
        assert torch.equal(
            dequantize_matrix(quantize_matrix(torch.zeros(2, 64), packing), packing, (2, 64)), torch.zeros(2, 64)
        )
        for value in (0.5, -3e-7, 1e-30):
            weight = torch.full((2, 64), value)
            torch.testing.assert_close(
                dequantize_matrix(quantize_matrix(weight, packing), packing, (2, 64)), weight, rtol=5e-3, atol=0
            )


def test_bytes_do_not_depend_on_strides_or_threads():
    weight = torch.randn(48, 96)
    packing = Packing(4, 32)
    assert torch.equal(quantize_matrix(weight.T, packing), quantize_matrix(weight.T.contiguous(), packing))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Packing(5, 64), "5 bits per weight: one of 8, 4, 2"),
        (lambda: Packing(4, 48), "groups of 48 inputs: one of 32, 64, 128"),
        (lambda: quantize_matrix(torch.randn(4, 33), Packing(4, 32)), "4 x 33 has no rows of whole bytes in 4 bits"),
        (lambda: quantize_matrix(torch.randn(4, 2, 32), Packing(4, 32)), "takes a matrix of floats"),
        (lambda: quantize_matrix(torch.ones(4, 32, dtype=torch.int32), Packing(4, 32)), "takes a matrix of floats"),
        (lambda: quantize_matrix(torch.full((4, 32), float("nan")), Packing(8, 32)), "rows 0 to 3 hold weights that are not"),
        (lambda: dequantize_matrix(torch.zeros(64, dtype=torch.uint8), Packing(4, 32), (4, 64)), "is 192 contiguous bytes"),
    ],
)
def test_what_cannot_be_stored_says_so(make, words):
    with pytest.raises(BadInput, match=words):
        make()
