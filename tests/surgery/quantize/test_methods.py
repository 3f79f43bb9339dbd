"""What each way of rounding and of giving out bits promises."""

from itertools import pairwise, product

import pytest
import torch

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import choose_codes
from moesaic.surgery.measured import output_error, run_with
from moesaic.surgery.memory import measure
from moesaic.surgery.operate import operate
from moesaic.surgery.quantize import pmq
from moesaic.surgery.quantize.awq import Awq, scales
from moesaic.surgery.quantize.edgemoe import EdgeMoe
from moesaic.surgery.quantize.gptq import Gptq, compensated, inverse_factor
from moesaic.surgery.quantize.hqq import Hqq
from moesaic.surgery.quantize.pmq import Pmq, solve
from moesaic.surgery.rounding import on_scales, relative_error, round_expert, round_matrix, spread
from moesaic.surgery.seen import seen
from moesaic.view.block import View

METHODS = [entry.name for entry in registry.entries("quantize")]
SLOW = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
NAMES = ("nemotron_h", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))
MATRICES = ("gate", "up", "down")


@pytest.fixture
def many():
    return [torch.randint(8, 80, (8, 17), generator=torch.Generator().manual_seed(4))]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_out_of_core_on_this_layout(name, on_disk, said, tmp_path):
    model_class, folder, statistics = on_disk(name, "R0,R1,R2")
    for method in METHODS:
        out = tmp_path / method
        report = operate(folder, out, "quantize", method, {"bits": 6, "group": 32}, calibration=statistics)
        bits = [width for block in report.blocks for width in block["bits"]]
        assert report.stock and set(bits) <= {2, 4, 8, 16} and sum(bits) <= 6 * len(bits), method
        if method != "pmq":
            assert sum(bits) == 6 * len(bits), method
        made, info = model_class.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert said(made).isfinite().all()
        for block, done in zip(View(made), report.blocks, strict=True):  # what packing will find
            for e, width in enumerate(done["bits"]):
                if width < 16:
                    found = block.bank[e]
                    again = round_expert(found, width, 32)
                    off = max(float((again[n] - found[n]).norm() / found[n].norm()) for n in MATRICES if n in found)
                    assert off < 2e-3, (method, width)


def test_gptq_is_nearer_on_the_inputs_and_stays_on_the_grid():
    generator = torch.Generator().manual_seed(0)
    x_TA = torch.randn(400, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    x_TA += 0.1 * torch.randn(400, 96, generator=generator)
    weight_BA = torch.randn(40, 96, generator=generator)
    factor_AA = inverse_factor((x_TA.T @ x_TA).double(), 0.01)
    for bits in (2, 4):
        made_BA, nearest_BA = compensated(weight_BA, factor_AA, bits, 32), round_matrix(weight_BA, bits, 32)
        errors = [float(((made - weight_BA) @ x_TA.T).norm()) for made in (made_BA, nearest_BA)]
        assert errors[0] < 0.8 * errors[1]
        scale_BA = spread(choose_codes(weight_BA, bits, 32)[1].float(), 32, 96)
        assert torch.equal(on_scales(made_BA, scale_BA, bits), made_BA)
    white = inverse_factor(torch.eye(96, dtype=torch.float64), 0.01)  # nothing to make up for
    assert torch.equal(compensated(weight_BA, white, 4, 32), round_matrix(weight_BA, 4, 32))


def test_gptq_rounds_rare_experts_to_nearest_and_weighs_by_gates(make, many):
    layer = measure(make("Mixtral"), many, "R0,R2,C")[0]
    counts = layer.statistics["selection_count"]
    rare, common = int(counts.argmin()), int(counts.argmax())
    method = Gptq(4, 32, least=int(counts.min()) + 1)
    nearest = round_expert(layer.expert(rare), 4, 32)
    assert all(torch.equal(method.rounded(layer, rare, 4)[n], nearest[n]) for n in nearest)
    nearest = round_expert(layer.expert(common), 4, 32)
    assert not torch.equal(method.rounded(layer, common, 4)["down"], nearest["down"])
    routed, gated, all_ = (Gptq(4, 32, tokens=kind).moments(layer, common) for kind in ("routed", "gated", "all"))
    x_SD, gate_S = seen(layer).of(common)
    assert routed[2] == gated[2] == len(x_SD) < all_[2]
    torch.testing.assert_close(routed[0], (x_SD.double().T @ x_SD.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gated[0], (x_SD * gate_S[:, None]).double().T @ x_SD.double(), rtol=1e-4, atol=1e-4)


def test_all_experts_see_all_tokens_and_the_output_stays(make, logits):
    one = [torch.tensor([[9]])]  # a single token: six of eight experts are not chosen
    model = make("Mixtral")
    before = logits(model, one)
    layer = measure(model, one, "R0,R2,C")[0]
    for e in range(8):
        first_AA, down_AA, count = Gptq(4, 32, tokens="all").moments(layer, e)
        assert count == 1 and bool(first_AA.any()) and bool(down_AA.any())
    assert torch.equal(logits(model, one), before)
    assert sum(bool(Gptq(4, 32).moments(layer, e)[0].any()) for e in range(8)) == 2


def test_hqq_lowers_its_norm_and_a_zero_point_helps_lopsided_groups():
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3)) ** 3
    for bits in (2, 3, 4):
        method = Hqq(bits)
        made, nearest = method.without_zero(weight, bits), round_matrix(weight, bits, 64)
        assert float(method.norm(weight - made).sum()) < float(method.norm(weight - nearest).sum())
    lopsided = torch.rand(16, 64, generator=torch.Generator().manual_seed(3)) + 1
    with_zero = Hqq(4, zero=True).with_zero(lopsided, 4)
    assert float((with_zero - lopsided).norm()) < 0.5 * float((round_matrix(lopsided, 4, 64) - lopsided).norm())
    assert not Hqq(4, zero=True).on_grid and torch.equal(Hqq(8, steps=0).without_zero(weight, 8), round_matrix(weight, 8, 64))


def test_the_sparse_part_of_hqq_by_hand():
    """sign(x) max(|x| - |x|^(p - 1) / beta, 0): the published shrinkage of a norm below 1."""
    found = Hqq(4, p=0.7).shrunk(torch.tensor([0.5, -0.5, 0.01, 0.0]), 10.0)
    large = 0.5 - 0.5**-0.3 / 10
    torch.testing.assert_close(found, torch.tensor([large, -large, 0.0, 0.0]))


def test_awq_scales_pass_through_the_expert_unrounded(make, many):
    layer = measure(make("Qwen3Moe"), many, "R0,R1")[0]
    expert, x = layer.expert(0), torch.randn(7, layer.facts.width)
    before = layer.run(0, x)[1]
    scale = scales(layer.statistics.mean("inner_abs")[0].float(), 0.7)
    assert not torch.allclose(scale, torch.ones(1)) and float(scale.log().mean().abs()) < 3
    moved = dict(expert) | {"down": expert["down"] * scale, "up": expert["up"] / scale[:, None]}
    torch.testing.assert_close(run_with(layer, 0, type(expert)(moved), x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.run(0, x)[1], before, rtol=0, atol=0)  # and is put back
    for name in ("GptOss", "NemotronH"):
        other = measure(make(name), many, "R0,R1")[0]
        made, nearest = Awq(4, 32).rounded(other, 0, 4), round_expert(other.expert(0), 4, 32)
        assert all(torch.equal(made[n], nearest[n]) for n in nearest)


def test_awq_is_no_worse_on_active_neurons(make, many):
    model = make("Qwen3Moe")
    for block in View(model):
        for e in range(8):
            expert = block.bank[e]
            expert["up"][:4] *= 30  # a few neurons do most
            block.bank[e] = expert
    layer = measure(model, many, "R0,R1,R2")[0]
    e = int(layer.statistics["selection_count"].argmax())
    ours, nearest = (output_error(layer, e, m) for m in (Awq(4, 32).rounded(layer, e, 4), round_expert(layer.expert(e), 4, 32)))
    assert ours < nearest


def test_the_programme_is_optimal_within_budget_and_monotone():
    generator = torch.Generator().manual_seed(0)
    for widths, spread_ in (((1, 2, 3), True), ((2, 4, 8), False)):
        for _ in range(6):
            cost = torch.rand(4, len(widths), generator=generator).sort(1, descending=True).values.double()
            last = float("inf")
            for mean in (2.25, 2.5, 3.0):
                chosen = solve(cost, widths, mean, spread_)
                worth = sum(float(cost[e, widths.index(b)]) for e, b in enumerate(chosen))
                allowed = [
                    way for way in product(widths, repeat=4)
                    if sum(way) <= 4 * mean and (not spread_ or {2, 3} <= set(way))
                ]  # fmt: skip
                best = min(sum(float(cost[e, widths.index(b)]) for e, b in enumerate(way)) for way in allowed)
                assert tuple(chosen) in allowed and worth == pytest.approx(best, rel=1e-6) and worth <= last + 1e-9
                last = worth
    with pytest.raises(BadInput, match="no choice of widths"):
        solve(torch.rand(4, 3).double(), (1, 2, 3), 1.0, True)


def test_pmq_gives_bits_to_what_is_used(make, many):
    layers = measure(make("Mixtral"), many, "R0,R2,C")
    for error in ("moments", "weights", "features"):
        method = Pmq(3.0, 32, error=error)
        bits = method.allocate([method.look(layer) for layer in layers], [layer.facts for layer in layers])
        for mine, layer in zip(bits, layers, strict=True):
            counts = layer.statistics["selection_count"]
            assert sum(mine) <= 24 and mine[int(counts.argmax())] >= mine[int(counts.argmin())]
    for options, match in (
        ({"widths": "2,5"}, "widths"),
        ({"bits": 1.5}, "the least of widths"),
        ({"error": "x"}, "error 'x'"),
    ):
        with pytest.raises(BadInput, match=match):
            Pmq(**options)


def test_the_cost_of_a_width_by_hand(make, many, monkeypatch):
    """usage^alpha gate^beta error^gamma, each a share of the layer's sum."""
    layer = measure(make("Mixtral"), many, "R0,R2")[0]
    seen = []
    monkeypatch.setattr(pmq, "solve", lambda cost_EW, *_: seen.append(cost_EW) or [2] * 8)
    for exponents in ((1.0, 1.5, 1.0), (0.5, 1.0, 2.0)):
        method = Pmq(3.0, 32, widths="2,4", error="weights", **dict(zip(("alpha", "beta", "gamma"), exponents, strict=True)))
        method.decide([method.look(layer)], [layer.facts])
        usage_E = layer.statistics["selection_count"].double()
        gate_E = layer.statistics["gate_sum"].double() / usage_E
        experts = [layer.expert(e) for e in range(8)]
        error_EW = torch.tensor([[relative_error(own, round_expert(own, bits, 32)) for bits in (2, 4)] for own in experts])
        parts = [usage_E[:, None], gate_E[:, None], error_EW.double()]
        want_EW = torch.ones(8, 2, dtype=torch.float64)
        for part, exponent in zip(parts, exponents, strict=True):
            want_EW = want_EW * (part / part.sum()) ** exponent
        torch.testing.assert_close(seen.pop(), want_EW)


def test_edgemoe_lowers_more_experts_as_more_loss_is_tolerated(make, many):
    layers = measure(make("Mixtral"), many, "R0,R1,R2")
    lowered, blocks = [], [layer.facts for layer in layers]
    for tolerate in (0, 1e-4, 0.005, 0.02, 0.05, 10.0):
        method = EdgeMoe(high=8, low=4, tolerate=tolerate, group=32)
        bits = method.allocate([method.look(layer) for layer in layers], blocks)
        lowered.append({(i, e) for i, row in enumerate(bits) for e, width in enumerate(row) if width == 4})
    assert not lowered[0] and all(a <= b for a, b in pairwise(lowered))
    assert len(lowered[-1]) == sum(facts.experts for facts in blocks)
    assert any(0 < len(each) < len(lowered[-1]) for each in lowered)
    assert EdgeMoe(bits=5).widths == (4, 8) and EdgeMoe(bits=8).widths == (8, 8)
