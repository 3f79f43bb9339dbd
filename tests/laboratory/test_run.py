"""Running cells: one process each, failures told, finished ones left alone, interrupted ones resumed exactly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moesaic.cli.sweeps import seconds
from moesaic.core.errors import BadInput

TIMES = {"seconds", "tokens_per_cpu_second", "memory_mb"}


def start(path, *arguments, command="sweep"):
    code = "from moesaic.cli.main import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", code, command, str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def run(path, *arguments, command="sweep"):
    process = start(path, *arguments, "--json", command=command)
    out, error = process.communicate(timeout=280)
    return process.returncode, json.loads(out) if out else None, error


def result(folder, key):
    told = json.loads((Path(folder) / "cells" / f"{key}.json").read_text())
    told["results"] = {name: value for name, value in told["results"].items() if name not in TIMES}
    return told


@pytest.mark.slow
def test_a_sweep_from_beginning_to_end(sweep_file, tmp_path):
    """A grid, a fitted cell, a masked one, a dense one, and one that cannot be built; then again, and with a change."""
    cells = [
        {"name": "fitted", "model.k": 1, "match": "model.expert_width"},
        {"name": "masked", "model.causal": False, "model.router": "expert_choice", "model.k": None, "balance": {}},
        {"name": "dense", "model.experts": 0, "model.k": None, "balance": {}},
        {"name": "wrong", "model.k": 9},
    ]
    path = sweep_file(grid={"model.router": ["topk"]}, cells=cells)
    code, told, error = run(path, "--jobs", "2")
    assert code == 1 and told["failed"] == ["wrong-s0"] and told["done"] == 4 and told["missing"] == [], error
    assert "k=9 experts per token" in next(row for row in told["rows"] if row["name"] == "wrong")["errors"][0]
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["fitted"]["fitted"] == 32, "one expert of twice the width"
    assert rows["fitted"]["flops_per_token"] == pytest.approx(rows["router=topk"]["flops_per_token"])
    assert rows["router=topk"]["experts_per_token"] == 2.0 and rows["dense"]["max_vio"] is None
    assert all(0 < row["bits_per_byte"] < 9 for row in rows.values() if row["seeds"])
    assert 0 <= rows["router=topk"]["changed"] <= 1 and rows["masked"]["max_vio"] == pytest.approx(0, abs=0.2)
    curve = result(tmp_path / "sweep", "dense-s0")["curve"]
    assert [point[0] for point in curve["loss"]] == list(range(1, 11)) and [point[0] for point in curve["valid"]] == [5, 10]
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert {cell["name"] for cell in summary["cells"]} == set(rows)
    assert "traceback" not in json.dumps(summary)
    assert (tmp_path / "sweep" / "curves.html").read_text().startswith("<!doctype html>")
    stamp = (tmp_path / "sweep" / "cells" / "dense-s0.json").stat().st_mtime_ns
    began = time.monotonic()
    code, again, _ = run(path)
    assert code == 1 and again["rows"] == told["rows"], "nothing was run again"
    assert (tmp_path / "sweep" / "cells" / "dense-s0.json").stat().st_mtime_ns == stamp
    assert time.monotonic() - began < 60
    path.write_text(path.read_text().replace("model.k: 9", "model.k: 3"))
    code, mended, error = run(path)
    assert code == 0 and mended["done"] == 5, error


@pytest.mark.slow
def test_interrupted_and_resumed_is_the_whole_run(sweep_file, tmp_path):
    path = sweep_file(cells=[{"name": "long"}], set={"steps": 400, "save_every": 20, "eval_every": 100})
    code, _, error = run(path, "--out", str(tmp_path / "whole"))
    assert code == 0, error
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(path)
        log = next_log(tmp_path / "sweep" / "cells", process)
        reached = len(log.read_text().splitlines())
        while len(log.read_text().splitlines()) < reached + 30 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=100)
        assert process.returncode == 130, said
        assert not (tmp_path / "sweep" / "cells" / "long-s0.json").exists()
        assert list(log.parent.glob("checkpoints/step-*")), "the cell saved its state"
    code, told, error = run(path)
    assert code == 0 and told["done"] == 1, error
    assert result(tmp_path / "sweep", "long-s0") == result(tmp_path / "whole", "long-s0")


def next_log(folder, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(folder.glob("long-s0-*/log.jsonl"))
        if logs and logs[0].read_text():
            return logs[0]
        time.sleep(0.01)
    raise AssertionError(f"no log: {process.communicate()}")


@pytest.mark.slow
def test_a_killed_cell_is_a_failure_and_the_budget_ends_a_sweep(sweep_file, tmp_path):
    path = sweep_file(cells=[{"name": "long"}], set={"steps": 100_000, "save_every": 100_000})
    process = start(path, "--json")
    log = next_log(tmp_path / "sweep" / "cells", process)
    cell = cell_process(process.pid)
    os.kill(cell, signal.SIGKILL)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and out, error
    assert "killed by SIGKILL" in json.loads(out)["rows"][0]["errors"][0]
    assert log.exists()
    code, told, error = run(path, "--retry", "--budget", "12s")
    assert (code, told["done"], told["missing"]) == (0, 0, ["long-s0"]), error


def cell_process(parent):
    """The process that trains: a child of the fork server, which is a child of the command."""
    for _ in range(100):
        for server in children(parent):
            for cell in children(server):
                return cell
        time.sleep(0.05)
    raise AssertionError("no cell runs")


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), (None, None)])
def test_budgets(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "0", "-3m", "3d"])
def test_a_wrong_budget_is_named(text):
    with pytest.raises(BadInput, match="--budget"):
        seconds(text)
