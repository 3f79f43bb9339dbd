"""`moesaic eval`: its table, its JSON object, and bad input in one line."""

from __future__ import annotations

import gzip
import json

import pytest

from moesaic.evaluation.compressors import compare


def test_json_has_every_domain(moesaic, tiny_moe, tiny_data):
    result = moesaic("eval", tiny_moe, "--data", tiny_data, "--json", "--threads", 1, "--compare-compressors")
    assert result.code == 0
    assert len(result.out.strip().splitlines()) == 1
    found = json.loads(result.out)
    assert set(found["domains"]) == {"prose", "code"}
    texts = {}
    for line in (tiny_data / "prose.jsonl").read_text().splitlines():
        texts.setdefault("prose", []).append(json.loads(line)["text"])
    row = found["domains"]["prose"]
    assert row["bytes"] == sum(len(t.encode()) for t in texts["prose"])
    assert {"bits_per_byte", "perplexity", "tokens", "bytes"} <= row.keys()
    assert row["xz_bits_per_byte"] == pytest.approx(compare(texts["prose"])["xz"])
    bits = sum(r["bits_per_byte"] * r["bytes"] for r in found["domains"].values())
    assert found["bits_per_byte"] == pytest.approx(bits / sum(r["bytes"] for r in found["domains"].values()))


def test_table_for_people(moesaic, tiny_moe, tmp_path):
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"the router keeps the best two"))
    result = moesaic("eval", tiny_moe, "--data", tmp_path / "notes.txt.gz", "--threads", 1)
    assert result.code == 0
    for words in ("notes", "bits/byte", "perplexity", "mean over domains"):
        assert words in result.out


def test_a_dense_model_is_scored_too(moesaic, tiny_dense, tiny_data):
    result = moesaic("eval", tiny_dense, "--data", tiny_data / "code.jsonl", "--json", "--max-bytes", 200, "--threads", 1)
    assert json.loads(result.out)["bytes"] == 200


def test_experts_implementations_agree(moesaic, tiny_moe, tiny_data):
    scores = [
        json.loads(
            moesaic("eval", tiny_moe, "--data", tiny_data, "--json", "--max-bytes", 300, "--experts", e, "--threads", 1).out
        )
        for e in ("moesaic", "eager")
    ]
    assert scores[0]["bits_per_byte"] == pytest.approx(scores[1]["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MOE"], "--data is missing"),
        (["MOE", "--data", "/nowhere"], "no such file or folder: /nowhere"),
        (["/nowhere/m", "--data", "DATA"], "no such model folder"),
        (["MOE", "--data", "DATA", "--context", "65"], "--context 65: this model takes 1 to 64"),
        (["MOE", "--data", "DATA", "--context", "8", "--stride", "9"], "--stride 9"),
        (["MOE", "--data", "DATA", "--max-bytes", "0"], "--max-bytes 0"),
        (["MOE", "--data", "DATA", "--batch-size", "-1"], "--batch-size -1"),
        (["MOE", "--data", "DATA", "--dtype", "int3"], "unknown dtype"),
        (["MOE", "--data", "BROKEN"], "broken.jsonl:2: not a JSON line"),
        (["MOE", "--data", "EMPTY"], "no text to score"),
    ],
)
def test_bad_input(moesaic, tiny_moe, tiny_data, tmp_path, arguments, words):
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("")
    names = {"MOE": tiny_moe, "DATA": tiny_data, "BROKEN": tmp_path / "broken.jsonl", "EMPTY": tmp_path / "empty.txt"}
    result = moesaic("eval", *[names.get(a, a) for a in arguments])
    assert words in result.complaint
    assert result.out == ""


def test_quantised_experts(moesaic, tiny_moe, tiny_data, tmp_path):
    score = ("eval", tiny_moe, "--data", tiny_data, "--json", "--threads", 1, "--max-bytes", 400)
    plain, int8, mixed = (
        json.loads(moesaic(*score, *more).out)
        for more in ((), ("--quantize", "int8:group=32"), ("--quantize", "mixed:high=8,low=2,share=0.5,group=32"))
    )
    assert "quantized" not in plain
    assert int8["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=0.02)
    assert int8["bits_per_byte"] != plain["bits_per_byte"]
    held = mixed["quantized"]
    assert held["importance"] == "this text"
    assert held["experts_by_bits"].keys() == {"8", "2"}
    assert held["expert_bytes"] < int8["quantized"]["expert_bytes"] < held["expert_bytes_before"]
    trace = tmp_path / "text.moetrace"
    assert moesaic("trace", tiny_moe, "--data", tiny_data, "-o", trace, "--max-bytes", 400, "--threads", 1).code == 0
    traced = json.loads(moesaic(*score, "--quantize", "mixed:high=8,low=2,share=0.5,group=32", "--importance", trace).out)
    assert traced["quantized"]["importance"] == str(trace)
    assert traced["quantized"]["experts_by_bits"] == held["experts_by_bits"]


def test_importance_goes_with_mixed_widths(moesaic, tiny_moe, tiny_data, tmp_path):
    result = moesaic("eval", tiny_moe, "--data", tiny_data, "--quantize", "int4", "--importance", tmp_path / "x.moetrace")
    assert "give --quantize mixed" in result.complaint
