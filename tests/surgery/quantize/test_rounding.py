"""Rounding to grids: what packing finds again, what is left alone, and what the command writes."""

import json
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import GRIDS, Packing, choose_codes, dequantize_matrix, quantize_matrix
from moesaic.surgery.memory import measure
from moesaic.surgery.memory import operate as operate_live
from moesaic.surgery.operate import operate
from moesaic.surgery.quantize.rtn import Rtn
from moesaic.surgery.rounding import between, on_scales, round_expert, round_matrix, spread
from moesaic.view.block import View

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_twice_is_rounding_once(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    for shape, group in (((96, 192), 64), ((7, 100), 32), ((5, 24), 128)):
        weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
        weight[0] = 0
        once = round_matrix(weight, bits, group)
        assert torch.equal(once, dequantize_matrix(quantize_matrix(weight, Packing(bits, group)), Packing(bits, group), shape))
        written = once.to(dtype)
        again = dequantize_matrix(quantize_matrix(written, Packing(bits, group)), Packing(bits, group), shape)
        if dtype == torch.float32:
            assert torch.equal(again, once)
        assert float((again - once).norm() / once.norm()) < 2e-3  # bf16 itself is off by as much


@pytest.mark.parametrize("bits", [4, 3])
def test_given_scales_are_found_again_whatever_levels_are_used(bits):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(64, 3, generator=generator).add(0.5).bfloat16().float()
    levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 192), generator=generator)
    levels[::4] = levels[::4].clamp(min=-(2 ** (bits - 1)) + 1)  # in a quarter of the rows the furthest level is not met
    weight = levels * spread(scale, 64, 192)
    assert torch.equal(round_matrix(weight, bits, 64), weight)
    if bits == 4:  # written in bf16, a few groups that reach no more than half of the levels are not told from others
        assert float((round_matrix(weight.bfloat16(), bits, 64) - weight).norm() / weight.norm()) < 0.005
    assert torch.equal(on_scales(weight, spread(scale, 64, 192), bits), weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_more_bits_are_nearer(bits):
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(2))
    off = {b: float((round_matrix(weight, b, 64) - weight).norm() / weight.norm()) for b in (1, 2, 3, 4, 8)}
    assert off[1] > off[2] > off[3] > off[4] > off[8]
    assert len(round_matrix(weight, bits, 64)[0, :64].unique()) <= 2**bits
    if bits == 8:  # at most half a step away, and at the furthest level half a step more: the scale itself is rounded
        scale = weight.abs().unflatten(1, (3, 64)).amax(2) / 128
        off_BA = (round_matrix(weight, 8, 64) - weight).abs() / spread(scale, 64, 192)
        assert float(off_BA.max()) <= 1.1 and float((off_BA <= 0.51).float().mean()) > 0.98


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weight_that_is_not_cut_off_is_at_most_half_a_step_away(bits):
    weight = torch.randn(64, 192, generator=torch.Generator().manual_seed(5))
    codes, scale_BG = choose_codes(weight, bits, 64)
    step, first = GRIDS[bits]
    scale_BA = spread(scale_BG.float(), 64, 192)
    level_BA = weight / scale_BA
    ends_BA = (level_BA > (2**bits - 1) * step + first) | (level_BA < first)
    steps_BA = (level_BA - (codes.float() * step + first)).abs() / step
    slack_BA = 2.0**-9 * level_BA.abs() / step + 1e-6  # codes are chosen before the scale is rounded to bf16
    assert bool((steps_BA <= 0.5 + slack_BA)[~ends_BA].all())
    if bits == 8:  # the largest weight of a group lies on the grid; its opposite may be cut off, by a step at most
        assert bool((steps_BA <= 1 + slack_BA).all()) and float(ends_BA.float().mean()) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_out_of_core_on_this_layout(name, on_disk, said, tmp_path):
    model_class, folder, _ = on_disk(name, "R0")
    report = operate(folder, tmp_path / "out", "quantize", "rtn", {"bits": 4, "group": 32})
    assert report.stock and report.bytes_after == report.bytes_before
    made, twin = model_class.from_pretrained(tmp_path / "out"), model_class.from_pretrained(folder)
    own = dict(twin.named_parameters())
    for block, before, done in zip(View(made), View(twin), report.blocks, strict=True):
        assert done["bits"] == [4] * block.num_experts and 0.02 < min(done["error"]) <= max(done["error"]) < 0.2
        for e in range(block.num_experts):
            expected = round_expert(before.bank[e], 4, 32)
            assert all(torch.equal(block.bank[e][n], expected[n]) for n in expected)
    for n, p in made.named_parameters():  # router, shared experts, biases and attention stay
        if not n.endswith(("gate_up_proj", "up_proj", "down_proj")) or p.dim() < 3:
            assert torch.equal(p, own[n]), n
    assert not torch.equal(said(made), said(twin))


def test_a_permutation_of_the_experts_commutes(make, ids, logits, shuffle):
    first, second = make("DeepseekV3"), make("DeepseekV3")
    shuffle(second)
    bits = [operate_live(Rtn(6), measure(model, ids, "R0")) for model in (first, second)]
    counts = [sorted(b for change in found for b in change.report["bits"]) for found in bits]
    assert counts[0] == counts[1] and counts[0].count(8) == len(counts[0]) // 2
    torch.testing.assert_close(logits(first, ids), logits(second, ids), rtol=1e-4, atol=1e-4)


def test_means_between_widths():
    assert between(4) == (4, 4) and between(2.5) == (2, 4) and between(12) == (8, 16) and between(1.5) == (1, 2)
    for options, match in (({"bits": 17}, "bits 17"), ({"group": 48}, "group 48")):
        with pytest.raises(BadInput, match=match):
            Rtn(**options)


@pytest.fixture
def moesaic_command(capsys, monkeypatch, tmp_path):
    from moesaic.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        with suppress(SystemExit):
            main([str(a) for a in arguments])
        return capsys.readouterr()

    return call


@pytest.mark.slow
def test_command_writes_what_streams(moesaic_command, tmp_path):
    found = json.loads(moesaic_command("quantize", "bundled", "out", "--bits", 3, "--method", "rtn", "--json").out)
    assert found["stock"] and found["bytes_after"] == found["bytes_before"]
    assert "3 bits cannot be packed" in moesaic_command("quantize", "bundled", "p", "--bits", 3, "--format", "packed").err
    packed = json.loads(moesaic_command("quantize", "bundled", "p4", "--bits", 4, "--format", "packed", "--json").out)
    assert packed["bytes_after"] < 0.5 * packed["bytes_before"] and not (tmp_path / "p4.rounded").exists()
    moesaic_command("quantize", "bundled", "r4", "--bits", 4, "--json")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    scores = [json.loads(moesaic_command("eval", out, "--data", text, "--json").out)["bits_per_byte"] for out in ("p4", "r4")]
    assert abs(scores[0] - scores[1]) < 0.01 * scores[1]
    AutoModelForCausalLM.from_pretrained("r4")
