"""Experts as factors: what they compute, what is written, what each method promises."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.factored import fill, install
from moesaic.surgery.compress.d2_moe import D2Moe
from moesaic.surgery.compress.low_rank import LowRank
from moesaic.surgery.compress.mc_smoe import McSmoe
from moesaic.surgery.compress.moe_i2 import MoeI2Ranks, ranks
from moesaic.surgery.factored import low_rank, moment_of, upright, whitened
from moesaic.surgery.memory import measure
from moesaic.surgery.memory import operate as operate_live
from moesaic.surgery.operate import operate
from moesaic.surgery.reconstruct import Reconstruction
from moesaic.surgery.shapes import facts_of
from moesaic.view.block import View

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")
MIDDLE = 0.6


@pytest.mark.parametrize("name", NAMES)
def test_factors_on_disk_say_what_the_dense_twin_says(name, on_disk, said, tmp_path):
    _, folder, statistics = on_disk(name, "R0,R1,R2")
    wide = {"keep": MIDDLE, "base": "frequency"}
    report = operate(folder, tmp_path / "out", "compress", "d2_moe", wide, calibration=statistics)
    dense = operate(folder, tmp_path / "dense", "compress", "d2_moe", {**wide, "store": "dense"}, calibration=statistics)
    assert not report.stock and dense.stock and dense.bytes_after == dense.bytes_before
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    banks = [sum(f.experts * f.expert_bytes for f in facts_of(View(twin)))]
    saved = report.bytes_before - report.bytes_after
    assert saved == pytest.approx((1 - MIDDLE) * banks[0], rel=0.2) and report.blocks[0]["share"] <= MIDDLE
    one, other = said(made), said(twin)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert [block.num_experts for block in View(made)] == [8] * len(View(made))
    with pytest.raises(BadInput, match="held as factors"):
        View(made)[0].bank[0]
    with pytest.raises(BadInput, match="its experts are factors"):
        operate(tmp_path / "out", tmp_path / "again", "prune", "random", {"keep": 4})


@pytest.mark.parametrize("shared", [None, "left", "right"])
@pytest.mark.parametrize("name", ["GptOss", "NemotronH", "Mixtral"])
def test_the_bank_and_its_multiplied_out_twin(make, name, shared):
    """Ranks 0 and full, rows none and all, empty slots, no tokens; a base, one of a few outputs and inputs, and none."""
    gated, part = name != "NemotronH", name != "Mixtral" and shared is not None
    model = make(name)
    block = View(model)[0]
    experts, E = block.experts, block.num_experts
    facts = facts_of(View(model))[0]
    H, D, inner = (2 if gated else 1) * facts.inner, facts.width, facts.inner
    generator = torch.Generator().manual_seed(0)
    form, bank = {}, {}
    for side, B, A in (("first", H, D), ("down", D, inner)):
        counts, rows = [0, 1, 5, min(A, B), 2, 0, 3, 1], [0, 2, B, 1, 0, 0, 3, 4]
        form[side] = {"ranks": counts, "base": name != "Mixtral", "rows": rows, "shared": shared}
        bank |= {
            f"{side}.left": torch.randn((max if shared == "left" else sum)(counts), B, generator=generator) * 0.1,
            f"{side}.right": torch.randn((max if shared == "right" else sum)(counts), A, generator=generator),
            f"{side}.rows": torch.randn(sum(rows), A, generator=generator),
            f"{side}.index": torch.cat([torch.randperm(B, generator=generator)[:n] for n in rows]),
        }
        outputs, inputs = torch.arange(0, B, 2 if part else 1), torch.arange(0, A, 3 if part else 1)
        if form[side]["base"]:
            bank[f"{side}.base"] = torch.randn(len(outputs), len(inputs), generator=generator) * 0.2
        if part:
            form[side] |= {"outputs": len(outputs), "inputs": len(inputs)}
            bank |= {f"{side}.outputs": outputs, f"{side}.inputs": inputs}
    twin = copy.deepcopy(experts)
    factors = install(experts, form)
    fill(factors, bank)
    for e in range(E):
        first, down = factors.first.dense(e), factors.down.dense(e)
        up = twin.gate_up_proj if gated else twin.up_proj
        with torch.no_grad():
            up[e] = first.T if twin.is_transposed else first
            twin.down_proj[e] = down.T if twin.is_transposed else down
    for tokens in (0, 1, 13):
        x = torch.randn(tokens, D, generator=generator)
        ids = torch.randint(0, E, (tokens, 2), generator=generator)
        weights = torch.rand(tokens, 2, generator=generator)
        torch.testing.assert_close(experts(x, ids, weights), twin(x, ids, weights), rtol=1e-4, atol=1e-4)
    x = torch.randn(5, D, generator=generator)
    empty = torch.full((5, 2), E)
    assert not experts(x, empty, torch.ones(5, 2)).any()
    experts(x, ids[:5], weights[:5]).sum().backward()
    assert factors.first.left.grad is not None


def test_low_rank_is_the_best_of_its_rank_and_full_rank_is_exact(make, ids, logits):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(weight, 7)
    values = torch.linalg.svdvals(weight)
    assert float((weight - left.T @ right).norm()) == pytest.approx(float(values[7:].norm()), rel=1e-5)
    for whiten in (False, True):
        model = make("Olmoe")
        before = logits(model, ids)
        operate_live(LowRank(0.5, rank=10_000, whiten=whiten), measure(model, ids, "R0,R2"))
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-3)


def test_whitened_error_is_the_discarded_singular_values_and_below_plain():
    generator = torch.Generator().manual_seed(1)
    x_TA = torch.randn(200, 20, generator=generator) * torch.logspace(0, -2, 20)
    delta, gram = torch.randn(30, 20, generator=generator), (x_TA.T @ x_TA).double()
    values = torch.linalg.svdvals(delta.double() @ torch.linalg.cholesky(gram))
    for rank in (1, 5, 12, 20):
        left, right = whitened(delta, gram, rank)
        error = float(((delta - left.T @ right) @ x_TA.T).norm())
        assert error == pytest.approx(float(values[rank:].norm()), rel=1e-3, abs=1e-3)
        left, right = low_rank(delta, rank)
        assert error <= float(((delta - left.T @ right) @ x_TA.T).norm()) * 1.0001 + 1e-3


def test_d2_moe_of_identical_experts_and_of_uniform_weights(make, ids, logits):
    model = make("Mixtral")
    for block in View(model):
        for e in range(1, 8):
            block.bank[e] = block.bank[0]
    before, layers = logits(model, ids), measure(model, ids, "R0,R2,B")
    for base in ("fisher", "frequency", "mean"):
        torch.testing.assert_close(D2Moe(base=base).mean(layers[0], "first"), upright(layers[0], 0, "first"))
    operate_live(D2Moe(0.126), layers)  # the base, and rank 0
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-4)
    model = make("Mixtral")
    layer = measure(model, ids, "R0,R2")[0]
    layer.statistics.sums["selection_count"] = torch.ones(8, dtype=torch.float64)
    plain = torch.stack([upright(layer, e, "down") for e in range(8)]).mean(0)
    for base in ("mean", "frequency"):
        torch.testing.assert_close(D2Moe(base=base).mean(layer, "down"), plain)
    with pytest.raises(BadInput, match="the base alone takes 1/8"):
        D2Moe(0.1).plan([layer.facts])


def test_moments_of_rare_experts_are_those_of_all(make, ids):
    layer = measure(make("Mixtral"), ids, "R0,R2")[0]
    counts = layer.statistics.sums["selection_count"] = layer.statistics["selection_count"].clone()
    e = int(counts.argmin())
    counts[e] = 0
    moment = moment_of(layer, e, "first")
    assert bool(torch.linalg.eigvalsh(moment).min() > 0)
    shared = layer.statistics["input_gram_sum"].double().sum(0) / float(counts.sum())
    torch.testing.assert_close(moment, shared, rtol=1e-3, atol=1e-4)


def test_the_base_is_the_mean_weighted_by_fisher_information_and_use(make, ids):
    layer = measure(make("GptOss"), ids, "R0,R2,B")[0]
    use_E = layer.statistics["selection_count"].double() / float(layer.statistics["selection_count"].sum())
    fisher_EAB = layer.statistics["fisher.down_proj_sum"].double() + 1e-12  # transposed, as the parameter is
    layer.statistics.sums["fisher.down_proj_sum"] = fisher_EAB.float()
    share_EAB = use_E[:, None, None] * fisher_EAB
    want_AB = (share_EAB / share_EAB.sum(0) * layer.block.experts.down_proj.detach().double()).sum(0)
    torch.testing.assert_close(D2Moe(base="fisher").mean(layer, "down").double(), want_AB.T, rtol=1e-4, atol=1e-5)


def test_the_two_products_have_inputs_of_their_own(make, ids):
    """x enters gate and up, the inner activations enter down."""
    layer = measure(make("Mixtral"), [torch.randint(8, 80, (40, 17))], "R0,R2,C")[0]
    x_TD = layer.features()[0]
    chosen_TK = layer.block.route(x_TD).experts_TK
    e = int(layer.statistics["selection_count"].argmax())
    mine_SD = x_TD[(chosen_TK == e).any(1)]
    assert len(mine_SD) > 32
    for side, rows in (("first", mine_SD), ("down", layer.run(e, mine_SD)[0])):
        want = rows.double().T @ rows.double() / len(rows)
        torch.testing.assert_close(moment_of(layer, e, side, damp=0.0), want, rtol=1e-4, atol=1e-6)


def test_moe_i2_at_full_rank_is_exact(make, ids, logits):
    model = make("NemotronH")
    before, method = logits(model, ids), MoeI2Ranks(0.99)
    method.keep = 100.0
    changes = operate_live(method, measure(model, ids, "C"))
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-3, atol=1e-3)
    assert all(max(change.report["first_error"] + change.report["down_error"]) < 1e-5 for change in changes)


def test_ranks_follow_importance_and_sum_exactly():
    assert ranks([1, 1, 1, 1], 20, 16, 0.25) == [5, 5, 5, 5]
    found = ranks([8, 4, 2, 1], 37, 16, 0.25)
    assert sum(found) == 37 and found == sorted(found, reverse=True) and max(found) <= 16 and min(found) >= 2
    assert ranks([1, 0, 0], 400, 16, 0.0) == [16, 16, 16]


def test_moe_i2_gives_ranks_to_the_experts_that_the_output_misses_most(make, ids):
    layer = measure(make("Olmoe"), ids, "C")[0]
    method, output = MoeI2Ranks(0.5, floor=0.0), Reconstruction(layer, 1024)
    change = method.change(layer, method.look(layer))
    assert change.scores.tolist() == pytest.approx([output.error((e,)) for e in range(8)])
    order = torch.argsort(change.scores).tolist()
    for side in ("first", "down"):
        given = [change.report[f"{side}_ranks"][e] for e in order]
        assert given == sorted(given) and given[0] < given[-1]


def test_mc_smoe_keeps_the_rows_that_matter(make, ids, logits):
    model = make("Qwen3Moe")
    layers = measure(model, ids, "B")
    before = logits(model, ids)
    method = McSmoe(0.6, rho=0.15)
    factors, residual, _ = method.parts(layers[0], 0, "first")
    torch.testing.assert_close(factors[0].T @ factors[1] + residual, upright(layers[0], 0, "first"))
    looks = [method.look(layer) for layer in layers]
    wider = McSmoe(0.8, rho=0.15)
    fewer, more = method.decide(looks, []), wider.decide([wider.look(layer) for layer in layers], [])
    assert all(bool((b[s] | ~a[s]).all()) for a, b in zip(fewer, more, strict=True) for s in a)  # rows only go as bytes do
    kept = torch.cat([look[s][0].flatten()[d[s].flatten()] for look, d in zip(looks, fewer, strict=True) for s in d])
    lost = torch.cat([look[s][0].flatten()[~d[s].flatten()] for look, d in zip(looks, fewer, strict=True) for s in d])
    assert kept.min() >= lost.max() and kept.min() > 0  # rows without gradient went first
    changes = operate_live(method, layers)
    share = sum(change.report["share"] for change in changes) / len(changes)
    assert 0.5 < share <= 0.6 + 1e-6
    assert not torch.equal(logits(model, ids), before)
