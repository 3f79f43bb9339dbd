"""The routing benchmark: every router runs in it, and its table adds up."""

from __future__ import annotations

import json

import pytest

from moesaic.bench import routing as bench
from moesaic.bench.routing import Options
from moesaic.core import registry
from moesaic.core.errors import BadInput

PROFILE = {"float32_flops": 1e11, "bfloat16_flops": 1e11, "read_bytes_per_second": 1e10}
SMALL = {"tokens": 32, "length": 16, "width": 32, "inner": 16, "experts": 32, "slots": 4, "rounds": 3, "seconds": 0.0}


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr(bench.machine, "load_or_measure", lambda device: PROFILE)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_router_is_measured(mode):
    result = bench.run(Options(**SMALL, mode=mode))
    rows = {row["impl"]: row for row in result["rows"]}
    assert rows.keys() == {entry.name for entry in registry.entries("routing")} | {"layer"}
    assert not [row for row in result["rows"] if row["error"]]
    assert rows["topk"]["overhead_seconds"] == 0 and rows["adamoe"]["seconds"] > 0
    flops = (3 if mode == "train" else 1) * 32 * 2 * 32 * 32
    assert rows["topk"]["floor_seconds"] == pytest.approx(flops / 1e11)
    share = rows["scot"]["overhead_seconds"] / rows["layer"]["seconds"]
    assert rows["scot"]["share_of_layer"] == pytest.approx(share)


def test_the_command_prints_one_object(capsys, tmp_path):
    from moesaic.cli.main import main

    sizes = ["-T", "16", "--length", "8", "-D", "16", "-E", "8", "-K", "2", "--rounds", "1", "--seconds", "0"]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "routing", *sizes, "--routers", "moge", "--no-layer", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0 and [row["impl"] for row in result["rows"]] == ["topk", "moge"]
    assert result["rows"][1]["share_of_layer"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [({"mode": "fast"}, "train"), ({"length": 5}, "multiple"), ({"slots": 99}, "-K 99"), ({"width": 31}, "heads"),
     ({"routers": ("nosuch",)}, "no routing method"), ({"rounds": 0}, "at least 1")],
)  # fmt: skip
def test_bad_options_are_refused(change, says):
    with pytest.raises(BadInput, match=says):
        bench.run(Options(**{**SMALL, **change}))
