"""What `moesaic run` and `serve` say of a packed model whose experts are rounded; budgets too small for one expert."""

from __future__ import annotations

import json

import pytest

SHORT = ("--max-new-tokens", "4", "--threads", "1", "--no-page")


@pytest.fixture(scope="module")
def packed(tiny_moe, tmp_path_factory):
    """The tiny model (8 experts of 3 matrices of 16 x 8), one expert in 8 bits, the others in 4."""
    from moesaic.serving.streamed.bits import Bits
    from moesaic.serving.streamed.packing import pack
    from moesaic.view import quiet

    out = tmp_path_factory.mktemp("packed") / "out"
    with quiet():
        pack(tiny_moe, out, bits=Bits({"default": 4, "model.layers.0.mlp.experts.1": 8}), group_size=32)
    return out


@pytest.mark.parametrize("where", [(), ("--resident", 0.5)])
def test_rounded_experts_are_labelled(moesaic, packed, tiny_moe, where):
    whole = json.loads(moesaic("run", tiny_moe, "the router", "--json", *SHORT).out)
    result = moesaic("run", packed, "the router", "--json", *where, *SHORT)
    found = json.loads(result.out)
    assert (whole["exact"], found["exact"]) == (True, False)
    assert "rounding" not in whole
    rounding = found["rounding"]
    assert (rounding["experts_by_bits"], rounding["group_size"]) == ({"4": 7, "8": 1}, 32)
    assert 4 < rounding["bits_per_weight"] < 16
    assert rounding["original_expert_bytes"] == 8 * 3 * 16 * 8 * 4
    assert rounding["bits_per_weight"] == pytest.approx(8 * rounding["expert_bytes"] / (8 * 3 * 16 * 8))
    assert whole["total_bytes"] - found["total_bytes"] == rounding["original_expert_bytes"] - rounding["expert_bytes"]
    if not where:
        assert found["resident_bytes"] == found["total_bytes"]
    said = " ".join(result.err.split())
    assert "no: experts rounded to 4 and 8 bits in groups of 32" in said and "bits per weight" in said


def test_a_lossless_packing_is_exact(moesaic, tiny_moe, tmp_path):
    assert moesaic("pack", tiny_moe, tmp_path / "out").code == 0
    found = json.loads(moesaic("run", tmp_path / "out", "the router", "--json", *SHORT).out)
    assert found["exact"] is True and "rounding" not in found


@pytest.mark.parametrize(
    "command", [("run", "{}", "the router"), ("serve", "{}", "--port", 0), ("eval", "{}", "--data", "{text}")]
)
def test_a_budget_too_small_for_one_expert_names_the_least(moesaic, tiny_moe, tmp_path, command):
    text = tmp_path / "text.txt"
    text.write_text("the router chooses\n" * 20)
    words = [str(word).format(tiny_moe, text=text) for word in command]
    complaint = moesaic(*words, "--memory", "1KiB").complaint
    assert "a budget of 1 KiB is too small: one expert to stream through takes 1.5 KiB (1536 bytes)" in complaint
