"""The benchmark itself: fair timing, right floors, the JSON contract, and bad input in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moesaic.bench import BENCHMARKS, layer, machine
from moesaic.bench.routings import draw, shares
from moesaic.bench.runner import interleave, speedup, summary
from moesaic.core.errors import BadInput

TINY = ["--tokens", "1,5", "-D", "128", "-I", "64", "-E", "4", "-K", "2", "--rounds", "3", "--seconds", "0.1"]


def bench(*arguments, **environment):
    script = "from moesaic.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, "bench", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_every_benchmark_is_a_module_and_a_command():
    shown = bench("--help").stdout
    for name in BENCHMARKS:
        assert name in shown
        assert (Path(layer.__file__).parent / f"{name}.py").is_file()


def test_contestants_run_in_turn_on_the_same_inputs():
    calls = []
    seconds = interleave({"a": lambda i: calls.append(("a", i)), "b": lambda i: calls.append(("b", i))}, 4, 60)
    assert calls == [("a", 0), ("b", 0), *((name, i) for i, turn in enumerate(["ab", "ba"] * 2) for name in turn)]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4}
    assert len(interleave({"slow": lambda i: time.sleep(0.01)}, 100, 0.0)["slow"]) == 3  # the budget stops it


def test_summary_and_speedup():
    result = summary([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (result["seconds"], result["seconds_min"], result["rounds"]) == (3.0, 1.0, 5)
    assert speedup([2.0, 6.0, 8.0], [1.0, 2.0, 4.0]) == 2.0


def test_floor_is_the_larger_of_bytes_and_flops():
    profile = {"read_bytes_per_second": 1e9, "bfloat16_flops": 1e12, "float32_flops": 1e11}
    few, many = layer.Sizes(1, 100, 50, 4, 2), layer.Sizes(100000, 100, 50, 4, 2)
    got = layer.floor(few, 2, "bf16", False, profile)
    assert got == {"floor_seconds": pytest.approx((2 * 3 * 100 * 50 * 2 + 2 * 100 * 2) / 1e9), "floor": "bytes"}
    assert layer.floor(many, 4, "bf16", False, {**profile, "read_bytes_per_second": 1e14})["floor"] == "flops"
    assert layer.floor(few, 2, "int8", False, profile)["floor_seconds"] < got["floor_seconds"]


@pytest.mark.parametrize("kind", ["uniform", "zipf"])
def test_routings_draw_different_experts_by_their_shares(kind):
    shares_E = shares(kind, 16, Path("."))
    experts_TK, weights_TK = draw(shares_E, 4000, 1)
    got_E = torch.bincount(experts_TK.reshape(-1), minlength=16) / 4000
    assert (got_E - shares_E).abs().max() < 0.03
    experts_TK, weights_TK = draw(shares_E, 200, 8)
    assert all(len(set(row)) == 8 for row in experts_TK.tolist())
    assert torch.allclose(weights_TK.sum(1), torch.ones(200))


@pytest.mark.shared
def test_real_routing_is_uneven(shared):
    shares_E = shares("real", 64, shared / "data" / "routing")
    assert shares_E.sum() == pytest.approx(1)
    assert 1.2 < shares_E.max() * 64 < 10


def test_layer_prints_one_json_object_with_the_contract_keys(tmp_path):
    out = tmp_path / "deep" / "layer.json"
    ran = bench("layer", *TINY, "--routings", "uniform,real", "--routing-data", str(tmp_path), "--out", str(out), "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result == json.loads(out.read_text())
    assert any("real" in note for note in result["notes"])  # skipped with a note
    assert result["machine"]["cores"] == os.cpu_count()
    names = {row["impl"] for row in result["rows"]}
    assert {"moesaic cpu", "moesaic torch", "moesaic cpu int8", "transformers grouped_mm", "transformers eager"} <= names
    for row in result["rows"]:
        assert {"impl", "T", "dtype", "routing", "seconds", "floor_seconds", "ratio_to_grouped_mm", "error"} <= row.keys()
        assert row["seconds"] > 0
        assert row["floor_seconds"] > 0
        limit = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.03, "int4": 0.35}[row["dtype"]]
        assert row["error"] < limit, row["impl"]


def test_training_rows_and_the_table():
    ran = bench("layer", *TINY, "--routings", "zipf", "--dtypes", "bf16,fp32", "--train", COLUMNS="80")
    assert ran.returncode == 0, ran.stderr
    assert "T 5 zipf, train" in ran.stdout
    assert "moesaic auto fp32" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_against_another_revision_reports_both():
    ran = bench("layer", *TINY, "--dtypes", "fp32", "--routings", "uniform", "--against", "HEAD", "--json")
    if "not imported from one" in ran.stderr:
        pytest.skip("no git checkout here")
    if "--against HEAD" in ran.stderr or "failed at HEAD" in ran.stderr:
        pytest.skip(f"HEAD cannot run it: {ran.stderr.strip()}")
    result = json.loads(ran.stdout)
    assert result["against"] == "HEAD"
    assert all(row["seconds_against"] > 0 for row in result["rows"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "1,x"], "numbers"),
        (["--dtypes", "fp8"], "unknown dtype 'fp8'"),
        (["--routings", "skewed"], "unknown routing"),
        (["-K", "9", "-E", "8"], "9 slots from 8 experts"),
        (["--against", "no-such-revision", *TINY, "--dtypes", "fp32", "--routings", "uniform"], "no-such-revision"),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    ran = bench("layer", *arguments)
    assert ran.returncode == 2
    assert words in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_says_so():
    with pytest.raises(BadInput, match="no CUDA device"):
        layer.Options(device="cuda").check()


def test_machine_profile_is_kept_and_found(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = machine.measure(quick=True)
    assert all(value > 1e8 for value in profile.values())
    path = machine.save({"read_bytes_per_second": 1.0})
    assert path.is_relative_to(tmp_path)
    assert machine.load_or_measure()["read_bytes_per_second"] == 1.0
