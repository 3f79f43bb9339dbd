"""`moesaic analyze`: its tables, its JSON object, and one line for every kind of bad input."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from moesaic.core import registry
from moesaic.trace import segments
from moesaic.trace.file import KEY, Trace, from_arrays


def write(trace, path, **header):
    if header:
        trace = Trace(replace(trace.header, **header), trace.columns)
    with path.open("wb") as stream:
        segments.append(stream, trace.columns, trace.header.metadata())
    return path


def recorded(seed=0, experts=8, layers=3, tokens=600, **options):
    rng = np.random.default_rng(seed)
    x = np.argsort(rng.random((tokens, layers, experts)), -1)[..., :2]
    kind = {"lengths": [tokens // 6] * 6, "domain_S": [0, 1] * 3, "domains": ["prose", "code"]}
    kind |= {"tokens_T": np.arange(tokens) % 3, "weights_TLK": np.tile([0.7, 0.3], (tokens, layers, 1))}
    kind["ahead_TLAM"] = np.tile(np.arange(4) % experts, (tokens, layers, 1, 1))
    return from_arrays(x, experts, **(kind | options))


@pytest.fixture
def trace_file(tmp_path):
    return write(recorded(), tmp_path / "one.moetrace", model="tiny", tokenizer="abc")


def test_json_has_every_measure_and_every_layer(moesaic, trace_file):
    result = moesaic("analyze", trace_file, "--json", "--resamples", 50)
    assert result.code == 0 and len(result.out.strip().splitlines()) == 1
    found = json.loads(result.out, parse_constant=pytest.fail)
    names = {entry.name for entry in registry.entries("statistics")} - {"saturation"}
    assert names | {"file", "model", "tokens", "choices", "layers", "domains", "seconds", "skipped"} <= found.keys()
    assert (found["tokens"], found["choices"], found["model"], found["skipped"]) == (600, 3600, "tiny", {})
    assert len(found["layers"]) == 3
    for row in found["layers"]:
        assert {"load", "load_low", "load_high", "cv", "gini", "entropy", "dead", "srp", "sch"} <= row.keys()
        assert len(row["load"]) == 8 and sum(row["load"]) == pytest.approx(1)
        assert row["load_low"][0] < row["load"][0] < row["load_high"][0]
        assert "load_by_domain" not in row
    rows = found["srp"]["rows"]
    assert [row["window_tokens"] for row in rows] == [4, 16, 64, 256]
    assert rows[0]["low"] < rows[0]["srp"] < rows[0]["high"] and rows[3]["srp"] is None
    assert {"rho", "window_tokens", "sch", "strict", "static", "cache_experts"} <= found["sch"]["rows"][0].keys()


def test_tables_explain_themselves_and_advise(moesaic, trace_file):
    result = moesaic("analyze", trace_file, "--by-domain", "--resamples", 20)
    assert result.code == 0
    for word in ("layers", "locality", "domains", "prose", "SRP", "SCH", "Affinity", "Drops", "Streaming", "LRU"):
        assert word in result.out
    assert "nan" not in result.out


def test_only_takes_what_is_named(moesaic, trace_file):
    found = json.loads(moesaic("analyze", trace_file, "--only", "load,balance", "--by-domain", "--json").out)
    assert {"load", "balance"} <= found.keys() and not {"srp", "sch", "affinity"} & found.keys()
    assert set(found["layers"][0]["load_by_domain"]) == {"prose", "code"}
    for name in (entry.name for entry in registry.entries("statistics") if entry.name != "saturation"):
        assert moesaic("analyze", trace_file, "--only", name, "--resamples", 10).code == 0


def test_against_another_checkpoint(moesaic, trace_file, tmp_path):
    other = write(recorded(seed=1), tmp_path / "two.moetrace")
    found = json.loads(moesaic("analyze", trace_file, "--against", other, "--only", "load", "--json").out)
    assert found["saturation"]["overlap"] == pytest.approx(0.25, abs=0.03)
    assert found["saturation"]["chance"] == pytest.approx(0.25)
    assert "kept" in moesaic("analyze", trace_file, "--against", trace_file, "--resamples", 10).out


def test_what_was_not_recorded_is_left_out_or_refused_when_asked_for(moesaic, tmp_path):
    bare = write(recorded(weights_TLK=None, tokens_T=None, domain_S=None, domains=()), tmp_path / "bare.moetrace")
    found = json.loads(moesaic("analyze", bare, "--json", "--resamples", 10).out)
    assert "neither weights nor logits" in found["skipped"]["margin"] and "margin" not in found
    assert "margin was left out" in moesaic("analyze", bare, "--resamples", 10).out
    result = moesaic("analyze", bare, "--only", "margin")
    assert result.code == 2 and "neither weights nor logits" in result.err


def broken(tmp_path, trace_file):
    """Name, arguments, and what the message must say."""
    text = tmp_path / "note.txt"
    text.write_text("hello, this is no trace at all")
    weights, empty, cut, newer = (tmp_path / name for name in ("w.safetensors", "empty", "cut.moetrace", "newer.moetrace"))
    save_file({"w": np.zeros(3)}, weights)
    empty.write_bytes(b"")
    cut.write_bytes(trace_file.read_bytes()[:-100])
    one = recorded()
    metadata = one.header.metadata()
    metadata[KEY] = metadata[KEY].replace('"version": 1', '"version": 9')
    with newer.open("wb") as stream:
        segments.append(stream, one.columns, metadata)
    nothing = {"experts": one.experts_TLK[:0], "runs": one.runs_N4[:0], "sequences": one.columns["sequences"][:0]}
    bare = write(Trace(one.header, nothing), tmp_path / "nothing.moetrace")
    wrong = from_arrays(np.zeros((4, 1, 1), int), 8)
    wrong.columns["experts"][0] = 200
    id_200 = write(wrong, tmp_path / "wrong.moetrace")
    other = write(recorded(experts=9), tmp_path / "other.moetrace")
    tokenizer = write(recorded(), tmp_path / "tok.moetrace", tokenizer="xyz")
    shorter = write(recorded(tokens=594), tmp_path / "short.moetrace")
    return {
        "no file": ([tmp_path / "missing"], "no such trace"),
        "folder": ([tmp_path], "is a folder"),
        "text": ([text], "note.txt is no routing trace"),
        "weights": ([weights], "no routing trace"),
        "empty file": ([empty], "is empty"),
        "truncated": ([cut], "is truncated"),
        "newer": ([newer], "trace format 9"),
        "no tokens": ([bare], "holds no tokens"),
        "no expert": ([id_200], "has expert 200"),
        "measure": ([trace_file, "--only", "srq"], "--only srq"),
        "no other": ([trace_file, "--only", "saturation"], "--against"),
        "resamples": ([trace_file, "--resamples", -1], "--resamples -1"),
        "other model": ([trace_file, "--against", other], "has 9"),
        "tokenizer": ([trace_file, "--against", tokenizer], "different tokenizers"),
        "other text": ([trace_file, "--against", shorter], "different texts"),
    }


def test_bad_input_is_one_line_that_names_it(moesaic, trace_file, tmp_path):
    for name, (arguments, message) in broken(tmp_path, trace_file).items():
        result = moesaic("analyze", *arguments, "--json")
        assert result.code == 2, name
        assert message in result.err and len(result.err.strip().splitlines()) == 1, f"{name}: {result.err}"
        assert result.out == "", name
