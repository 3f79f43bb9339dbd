"""`moesaic pack`: what it writes runs everywhere, its JSON says what came out, and every bad option is one line."""

from __future__ import annotations

import json
import shutil

import pytest

SHORT = ("--max-new-tokens", "8", "--threads", "1", "--no-page", "--json")


def test_a_packed_copy_writes_the_same_text(moesaic, tiny_moe, tmp_path):
    found = json.loads(moesaic("pack", tiny_moe, "out", "--json").out)
    assert found["lossless"] is found["written"] is True
    assert found["out"] == "out" and found["experts"] == 8 and found["experts_by_bits"] == {"32": 8}
    assert found["bytes_after"] == found["expert_bytes"] + found["other_bytes"] >= found["bytes_before"]
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert found["bytes_after"] < written < found["bytes_after"] + 20000
    whole = json.loads(moesaic("run", tiny_moe, "the router", *SHORT).out)
    for how in ((), ("--resident", 0.5)):
        again = json.loads(moesaic("run", "out", "the router", *how, *SHORT).out)
        assert again["text"] == whole["text"]
    assert {path.name for path in tiny_moe.iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_eval_reads_it_too(moesaic, tiny_moe, tiny_data):
    moesaic("pack", tiny_moe, "out")
    ask = ("--data", tiny_data, "--max-bytes", "400", "--json")
    original, packed = (json.loads(moesaic("eval", model, *ask).out) for model in (tiny_moe, "out"))
    assert packed["bits_per_byte"] == original["bits_per_byte"]


def test_a_plan_writes_nothing(moesaic, tiny_moe, tmp_path):
    found = json.loads(moesaic("pack", tiny_moe, "--plan", "--bits", 4, "--json").out)
    assert (found["written"], found["out"], found["lossless"]) == (False, None, False)
    assert not list(tmp_path.iterdir())
    assert "those of rounded experts" in moesaic("pack", tiny_moe, "out", "--plan", "--bits", 8).out
    assert not list(tmp_path.iterdir())


def test_bits_of_the_most_used(moesaic, tiny_moe, tiny_data, tmp_path):
    moesaic("trace", tiny_moe, "--data", tiny_data, "--max-bytes", "400", "-o", "t.moetrace")
    found = json.loads(moesaic("pack", tiny_moe, "out", "--bits", 5, "--importance", "t.moetrace", "--json").out)
    assert found["experts_by_bits"] == {"4": 6, "8": 2}
    from moesaic.store.packed import read_packed
    from moesaic.trace import open_trace
    from moesaic.trace.statistics.load import load

    counts_LE = load(open_trace(tmp_path / "t.moetrace"), resamples=0).counts_LE
    more = [counts_LE[l, e] for l, block in enumerate(read_packed(tmp_path / "out").contents.blocks)
            for e in range(4) if block.bits_E[e] == 8]  # fmt: skip
    assert sorted(more) == sorted(counts_LE.reshape(-1))[-2:]
    assert json.loads(moesaic("run", "out", "the", "--resident", 0.5, *SHORT).out)["tokens"]


def test_bits_of_a_file(moesaic, tiny_moe, tmp_path):
    (tmp_path / "bits.json").write_text(json.dumps({"default": 8, "model.layers.1.mlp.experts": 16}))
    found = json.loads(moesaic("pack", tiny_moe, "out", "--bits", "bits.json", "--json").out)
    assert found["experts_by_bits"] == {"8": 4, "32": 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "OUT is missing"),
        (("out", "--bits", "3"), "3 for default: give 16 (as stored), 8, 4 or 2"),
        (("out", "--bits", "none.json"), "--bits none.json: give 16, 8, 4, 2 or a JSON file"),
        (("out", "--bits", "list.json"), 'expected an object such as {"default": 4'),
        (("out", "--bits", "text.json"), "text.json is not JSON"),
        (("out", "--bits", "odd.json"), "give 16 (as stored), 8, 4 or 2"),
        (("out", "--bits", "5", "--importance", "none.moetrace"), "none.moetrace"),
        (("out", "--group", "48"), "--group 48: one of 32, 64, 128"),
        (("out", "--threads", "0"), "--threads 0"),
        (("full",), "full is not empty"),
        (("list.json",), "list.json is there and is no folder"),
        (("again",), "again.partial is there from a packing that was broken off"),
        (("again", "--resume"), "again.partial was begun from another model"),
    ],
)
def test_bad_options_are_one_line(moesaic, tiny_moe, tmp_path, options, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "again.partial").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"default": "many"}')
    before = sorted(path.name for path in tmp_path.iterdir())
    assert words in moesaic("pack", tiny_moe, *options).complaint
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_models_that_cannot_be_packed(moesaic, tiny_moe, tiny_dense, tmp_path):
    assert "no Mixture-of-Experts block" in moesaic("pack", tiny_dense, "out").complaint
    assert "no such model folder" in moesaic("pack", tmp_path / "gone", "out").complaint
    assert "lies inside the model" in moesaic("pack", tiny_moe, tiny_moe / "out").complaint
    moesaic("pack", tiny_moe, "out")
    assert "is packed already" in moesaic("pack", "out", "twice").complaint
    shutil.copytree(tiny_moe, "sharded")
    (tmp_path / "sharded" / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in (("pack", "sharded", "two"), ("run", "sharded", "the"), ("run", "sharded", "the", "--resident", 0.5)):
        assert "no file of this folder" in moesaic(*command).complaint
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    for command in (("run", "out", "the"), ("run", "out", "the", "--resident", 0.5)):
        assert "no file of this folder" in moesaic(*command).complaint
