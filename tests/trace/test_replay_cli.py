"""`moesaic replay`: one JSON object, one table, one line per error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "policies"))

from routings import NAMES, SIZE, trace_of

from moesaic.cli.main import main
from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes, parse_rate, show_bytes
from moesaic.trace import segments

KEYS = {
    "policy", "cache_bytes", "cache_share", "hit_rate", "strict_hit_rate", "warm_hit_rate", "hit_rate_per_layer", "moved_bytes",
    "moved_bytes_per_token", "speculative_bytes_used", "speculative_bytes_wasted", "stall_seconds", "tokens_per_second",
    "bound_tokens_per_second", "exact", "simulation_seconds", "choices_per_second", "reason",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, trace):
    with path.open("wb") as stream:
        segments.append(stream, trace.columns, trace.header.metadata())
    return str(path)


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "t.moetrace", trace_of(1, tokens=60, lengths=[12] * 5))


def call(capsys, *words, code=0):
    try:
        main(["replay", *words])
        left = 0
    except SystemExit as stop:
        left = stop.code or 0
    said = capsys.readouterr()
    assert left == code, said.err
    return said


def test_one_policy_over_the_standard_sizes(capsys, file):
    result = json.loads(call(capsys, file, "--json").out)
    assert [row["cache_share"] for row in result["rows"]] == pytest.approx([i / 10 for i in range(1, 11)], abs=1e-6)
    assert all(row.keys() >= KEYS and row["policy"] == "lru" for row in result["rows"])
    assert {"link_bytes_per_second", "device_bytes_per_second", "host_flops", "name"} <= result["hardware"].keys()
    assert result["tokens"] == 60 and result["total_bytes"] == 24 * SIZE
    rates = [row["hit_rate"] for row in result["rows"]]
    assert rates == sorted(rates) and rates[-1] > rates[0]


def test_all_policies_in_one_table(capsys, file):
    said = call(capsys, file, "--policy", "all", "--cache", "25%,0.5")
    for name in NAMES:
        assert name in said.out
    assert "stated hardware pcie4" in said.out and "pre_gated*" in said.out and "changes the model" in said.out


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4MiB", 4 << 20),
        ("25%", 6 << 20),
        ("0.25", 6 << 20),
        ("100%", 24 << 20),
        ("3e6", 3_000_000),
        ("2 MB", 2_000_000),
        ("0", 0),
    ],
)
def test_cache_sizes(capsys, file, text, size):
    assert json.loads(call(capsys, file, "--cache", text, "--json").out)["rows"][0]["cache_bytes"] == size


def test_options_of_a_policy_and_of_the_machine(capsys, file):
    words = ["--policy", "lru,lru:scope=global,lfu:half_life=4+scope=layer", "--cache", "30%", "--json", "--bandwidth", "1GB/s"]
    result = json.loads(call(capsys, file, *words, "--hardware", "pcie5", "--host-flops", "0").out)
    assert [row["policy"] for row in result["rows"]] == ["lru", "lru:scope=global", "lfu:half_life=4+scope=layer"]
    assert result["hardware"]["link_bytes_per_second"] == 1e9 and result["hardware"]["host_flops"] == 0
    assert result["rows"][0]["hit_rate"] != result["rows"][1]["hit_rate"]


def test_other_sizes_stand_for_a_larger_model(capsys, file):
    one, two = (
        json.loads(call(capsys, file, "--cache", "50%", "--json", *more).out) for more in ([], ["--expert-bytes", "6MiB"])
    )
    assert two["total_bytes"] == 6 * one["total_bytes"]
    assert two["rows"][0]["hit_rate"] == one["rows"][0]["hit_rate"]
    assert two["rows"][0]["moved_bytes"] == 6 * one["rows"][0]["moved_bytes"]


def test_prompts_replayed_as_decoding(capsys, tmp_path):
    file = write(tmp_path / "p.moetrace", trace_of(1, tokens=60, decode=False, lengths=[30, 30]))
    one, two = (json.loads(call(capsys, file, "--cache", "50%", "--json", *more).out) for more in ([], ["--as-decode"]))
    assert one["rows"][0]["decode_tokens_per_second"] is None and two["rows"][0]["decode_tokens_per_second"] > 0
    assert one["rows"][0]["moved_bytes"] < two["rows"][0]["moved_bytes"]
    batched = json.loads(call(capsys, file, "--cache", "50%", "--json", "--as-decode", "--batch", "2").out)
    assert batched["rows"][0]["choices"] == two["rows"][0]["choices"]
    assert batched["rows"][0]["tokens_per_second"] > two["rows"][0]["tokens_per_second"]


def test_learning_is_labelled_and_never_replayed_unless_asked_for(capsys, file, tmp_path):
    other = write(tmp_path / "o.moetrace", trace_of(2, tokens=50, lengths=[25, 25]))
    words = [file, "--policy", "static", "--cache", "30%", "--json"]
    part = json.loads(call(capsys, *words).out)["rows"][0]
    itself = json.loads(call(capsys, *words, "--learn-share", "1").out)["rows"][0]
    elsewhere = json.loads(call(capsys, *words, "--learn-from", other).out)["rows"][0]
    assert part["choices"] == 48 * 6 and itself["choices"] == elsewhere["choices"] == 60 * 6
    assert "not replayed" in part["notes"][0] and "itself" in itself["notes"][0] and other in elsewhere["notes"][0]
    assert itself["hit_rate"] >= elsewhere["hit_rate"]


def test_a_stored_profile_is_used_and_named(capsys, file, tmp_path):
    folder = tmp_path / "cache" / "moesaic"
    folder.mkdir(parents=True)
    profile = {"read_bytes_per_second": 3e10, "bfloat16_flops": 4e11, "float32_flops": 2e11, "disk_bytes_per_second": 2e9}
    (folder / "box-2threads.json").write_text(json.dumps(profile))
    machine = json.loads(call(capsys, file, "--cache", "50%", "--json").out)["hardware"]
    assert machine["link_bytes_per_second"] == 2e9 and machine["name"].endswith("box-2threads.json")


def test_what_a_trace_lacks_is_a_reason_in_all_and_an_error_alone(capsys, tmp_path):
    file = write(tmp_path / "bare.moetrace", trace_of(1, tokens=20, signals=False))
    rows = json.loads(call(capsys, file, "--policy", "all", "--cache", "50%", "--json").out)["rows"]
    fate = next(row for row in rows if row["policy"] == "fate")
    assert "--lookahead 3" in fate["reason"] and fate["hit_rate"] is None
    said = call(capsys, file, "--policy", "hybrimoe:ahead=0", "--cache", "50%", code=2)
    assert "--logits" in said.err and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--cache", "4GX"], "--cache '4GX'"),
        (["--cache", "140%"], "--cache '140%'"),
        (["--cache", "-1"], "--cache '-1'"),
        (["--cache", "nan"], "--cache 'nan'"),
        (["--policy", "best"], "best"),
        (["--policy", ","], "--policy"),
        (["--policy", "lru:size=3"], "size=3"),
        (["--policy", "lru:scope=world"], "scope=world"),
        (["--policy", "slru:protected=much"], "protected=much"),
        (["--policy", "slru:protected=2"], "protected 2"),
        (["--expert-bytes", "0"], "--expert-bytes '0'"),
        (["--expert-bytes", "many"], "--expert-bytes 'many'"),
        (["--learn-share", "1.5"], "--learn-share 1.5"),
        (["--learn-from", "nowhere.moetrace"], "nowhere.moetrace"),
        (["--hardware", "abacus"], "--hardware 'abacus'"),
        (["--bandwidth", "fast"], "--bandwidth 'fast'"),
        (["--bandwidth", "0"], "--bandwidth '0'"),
        (["--host-flops", "-1"], "host_flops"),
        (["--batch", "-2"], "--batch -2"),
    ],
)
def test_bad_input_is_one_line_that_names_it(capsys, file, words, named):
    said = call(capsys, file, *words, code=2)
    assert named in said.err and said.err.count("\n") == 1 and not said.out


def test_bad_files(capsys, tmp_path):
    (tmp_path / "x.moetrace").write_bytes(b"nothing")
    assert "no routing trace" in call(capsys, str(tmp_path / "x.moetrace"), code=2).err
    assert "no such trace" in call(capsys, str(tmp_path / "y.moetrace"), code=2).err
    trace = trace_of(1, tokens=6)
    rows = tuple(layer._replace(expert_bytes=0) for layer in trace.layers)
    object.__setattr__(trace.header, "layers", rows)
    assert "--expert-bytes" in call(capsys, write(tmp_path / "z.moetrace", trace), code=2).err


def test_out_writes_the_same_object(capsys, file, tmp_path):
    said = call(capsys, file, "--cache", "50%", "--json", "--out", str(tmp_path / "deep" / "r.json"))
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == json.loads(said.out)


def test_sizes():
    assert parse_bytes("1.5GiB") == 3 << 29 and parse_bytes("1k") == 1024 and parse_bytes(" 7 b ") == 7
    assert parse_rate("25GB/s") == 25e9 and show_bytes(6 << 20) == "6 MiB" and show_bytes(0) == "0 B"
    for text in ("", "GiB", "1e40", "4 G i B", "-3", "inf"):
        with pytest.raises(BadInput, match="memory"):
            parse_bytes(text, "memory")
    assert np.isclose(parse_bytes("0.1TB"), 1e11)
