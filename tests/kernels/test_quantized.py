"""Quantised experts against their twin: dequantise, then the naive reference; and the same bits however spans arrive."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import Form, Packing, dispatch_slots, expert_mlp, quantize_bank, quantized
from moesaic.kernels.products import hit_spans

FORMATS = [(bits, size) for bits in (8, 4, 2) for size in (32, 64, 128)]
NEAR = 4e-3
"""Relative: rows are bf16, whose rounding alone is 2e-3."""


def bank(E=5, D=256, I=128, transposed=False, gated=True):
    H = 2 * I if gated else I
    gate_up, down = torch.randn(E, H, D) / D**0.5, torch.randn(E, D, I) / I**0.5
    return (gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()) if transposed else (gate_up, down)


def pairs(T, E, K=2):
    ids_TK = torch.rand(T, E).argsort(1)[:, :K]
    ids_TK[torch.rand(T, K) < 0.1] = -1
    return dispatch_slots(ids_TK, torch.rand(T, K), E)


def twin(x, dispatch, held, **how):
    plain = [torch.stack(m) for m in zip(*(held.dequantize(e) for e in range(held.num_experts)), strict=True)]
    return expert_mlp(x.float(), dispatch, *plain, backend="reference", **how)


def near(got, want, tolerance=NEAR):
    assert (got.float() - want.float()).norm() <= tolerance * want.float().norm()


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_products_match_the_twin(bits, group_size, tokens):
    held = quantize_bank(*bank(), bits, group_size)
    x, dispatch = torch.randn(tokens, 256).bfloat16(), pairs(tokens, 5)
    got, want = held.run(x, dispatch), twin(x, dispatch, held)
    assert got.dtype == x.dtype
    near(got, want, 2 * NEAR)


@pytest.mark.skipif(not quantized.available(), reason="needs Numba and AVX-512 VNNI")
@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("D", "inner"), [(256, 256), (512, 128), (896, 384)])
def test_integer_pass_is_finer_than_bf16(bits, group_size, D, inner):
    """Activations of 16 bits: an order of magnitude closer to fp32 than bf16 rows come."""
    held = quantize_bank(*bank(6, D, inner), bits, group_size)
    for T in (1, 2, 3, 5, 13):
        x, dispatch = torch.randn(T, D) * torch.rand(D) ** 8 * 100, pairs(T, 6, 3)
        y, spans = torch.zeros(T, D), hit_spans(dispatch.offsets_E1.tolist())
        experts = dict(enumerate(held.experts))
        assert quantized._suits(quantized._few, experts[0], Form())
        quantized._few(x, dispatch, experts, spans, y, Form())
        near(y, twin(x, dispatch, held), 3e-4)


@pytest.mark.parametrize("T", [1, 3, 40, 400])
@pytest.mark.parametrize("way", ["few", "many", "plain"])
def test_every_way_on_every_size_in_mixed_widths(T, way, monkeypatch):
    if way != "plain" and not quantized.available():
        pytest.skip("needs Numba and AVX-512 VNNI")
    monkeypatch.setattr(quantized, "_is_few", lambda dispatch: way == "few")
    if way == "plain":
        monkeypatch.setattr(quantized, "available", lambda: False)
    held = quantize_bank(*bank(6), [8, 4, 2, 4, 8, 2], 64)
    assert held.bits == (8, 4, 2, 4, 8, 2)
    x, dispatch = torch.randn(T, 256).bfloat16(), pairs(T, 6, 3)
    near(held.run(x, dispatch), twin(x, dispatch, held), 2 * NEAR)


@pytest.mark.parametrize("T", [1, 4, 64, 300])
@pytest.mark.parametrize("kind", ["compiled", "some compiled", "plain"])
def test_spans_in_any_pieces_give_the_same_bits(T, kind, monkeypatch):
    if kind == "plain":
        monkeypatch.setattr(quantized, "available", lambda: False)
    elif kind == "some compiled":  # int2 in groups of 32 is left to the twin
        suits = quantized._suits
        monkeypatch.setattr(quantized, "_suits", lambda way, e, form: e.gate_up_packing.bits != 2 and suits(way, e, form))
    monkeypatch.setattr(quantized, "WIDE_BYTES", 2 * 3 * 256 * 128 * 2)  # two experts widened at a time
    held = quantize_bank(*bank(9), [8, 4, 2] * 3, 32)
    x, dispatch = torch.randn(T, 256).bfloat16(), pairs(T, 9, 3)
    whole = held.run(x, dispatch)
    spans = hit_spans(dispatch.offsets_E1.tolist())
    for step in (1, 2, 5):
        y = torch.zeros(T, 256)
        for low in range(0, len(spans), step):
            here = spans[low : low + step]
            elsewhere = {  # the same records at other addresses, and nothing else in reach
                e: quantized.QuantizedExpert(
                    held.experts[e].gate_up.clone(), held.experts[e].down.clone(), *vars_of(held.experts[e])
                )
                for e, _, _ in here
            }
            quantized.add(x, dispatch, elsewhere, here, y)
        assert torch.equal(y.to(x.dtype), whole)


def vars_of(expert):
    return expert.gate_up_packing, expert.down_packing, expert.gate_up_shape, expert.down_shape


@pytest.mark.parametrize(
    "how",
    [
        {"gated": False, "act": "relu2"},
        {"act": "gelu"},
        {"apply_gate": lambda h: h[:, ::2].clamp(max=2) * h[:, 1::2].tanh()},
        {"post": lambda y: y / y.norm(dim=-1, keepdim=True)},
        {"biased": True},
    ],
    ids=["plain", "gelu", "own gate", "normed", "biased"],
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("T", [1, 50])
def test_every_form(how, transposed, T):
    how = dict(how)
    gated, biased = how.get("gated", True), how.pop("biased", False)
    held = quantize_bank(*bank(4, 96, 32, transposed, gated), 4, 32, transposed=transposed)
    biases = {"gate_up_bias": torch.randn(4, 64), "down_bias": torch.randn(4, 96)} if biased else {}
    x, dispatch = torch.randn(T, 96), pairs(T, 4)
    form = Form(**how, gate_up_bias_EH=biases.get("gate_up_bias"), down_bias_ED=biases.get("down_bias"))
    near(held.run(x, dispatch, form), twin(x, dispatch, held, **how, **biases), 1e-5)


@pytest.mark.parametrize(("D", "inner"), [(33 * 2, 17 * 2), (200, 40), (36, 4)])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("T", [1, 30])
def test_widths_no_pass_can_take(D, inner, bits, T):
    if D * bits % 8 or inner * bits % 8:
        pytest.skip("rows of no whole bytes")
    held = quantize_bank(*bank(3, D, inner), bits, 32)
    x, dispatch = torch.randn(T, D), pairs(T, 3)
    near(held.run(x, dispatch), twin(x, dispatch, held), 1e-3)


@pytest.mark.parametrize("T", [1, 100])
def test_empty_experts_and_one_expert_and_no_pairs(T):
    held = quantize_bank(*bank(), 4, 64)
    x = torch.randn(T, 256).bfloat16()
    one = Dispatch.of_slots(torch.full((T, 1), 4), torch.rand(T, 1), 5)
    near(held.run(x, one), twin(x, one, held), 2 * NEAR)
    none = Dispatch.of_slots(torch.full((T, 1), -1), torch.rand(T, 1), 5)
    assert torch.equal(held.run(x, none), torch.zeros_like(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_show(value):
    held = quantize_bank(*bank(), 4, 64)
    x = torch.randn(2, 256).bfloat16()
    x[1, 17] = value
    y = held.run(x, Dispatch.of_slots(torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2), 5))
    assert y[0].isfinite().all()
    assert y[1].isnan().any()


def test_size_is_that_of_the_widths():
    gate_up, down = bank(4)
    held = quantize_bank(gate_up, down, [8, 4, 4, 2], 64)
    weights = 3 * 256 * 128
    assert held.nbytes == sum(weights * bits // 8 + weights // 64 * 2 for bits in (8, 4, 4, 2))
    assert sum(expert.nbytes for expert in held.experts) == held.nbytes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: quantize_bank(*bank(), 3), "3 bits per weight: one of 8, 4, 2"),
        (lambda: quantize_bank(*bank(), [4, 8]), "2 widths and 5 down matrices for 5 experts"),
        (lambda: quantize_bank(*bank(2), 4).run(torch.randn(1, 99), pairs(1, 2)), r"expert \d reads inputs of width 256"),
        (lambda: quantize_bank(*bank(2), 4).run(torch.randn(1, 256).requires_grad_(), pairs(1, 2)), "have no backward"),
        (
            lambda: quantized.QuantizedExpert(
                torch.zeros(3, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8), Packing(4), Packing(4), (2, 64), (64, 1)
            ),
            "gate_up: the record of a 2 x 64 matrix",
        ),
    ],
)
def test_bad_input_says_what(make, words):
    with pytest.raises(BadInput, match=words):
        make()


@pytest.mark.skipif(not quantized.available(), reason="needs Numba and AVX-512 VNNI")
@pytest.mark.parametrize("bits", [4, [8, 4, 2, 4, 8, 4]])
@pytest.mark.parametrize("ids", [[5, 0, 3], [2], [1, -1], [6, 4]])
def test_one_token_is_the_same_without_a_dispatch(bits, ids):
    held, x = quantize_bank(*bank(6, 256, 256), bits, 64), torch.randn(1, 256).bfloat16()
    ids_1K, weights_1K = torch.tensor([ids]), torch.rand(1, len(ids)).bfloat16()
    with torch.no_grad():
        got = held.one_token(x, ids_1K, weights_1K, Form())
        want = held.run(x, dispatch_slots(ids_1K, weights_1K, 6), Form())
        assert got.dtype == x.dtype and torch.equal(got, want)
        assert held.one_token(x, torch.tensor([[2, 2]]), torch.rand(1, 2), Form()) is None
        assert held.one_token(x, ids_1K, weights_1K, Form(act="gelu")) is None
    assert held.one_token(x, ids_1K, weights_1K, Form()) is None
