"""`moesaic calibrate`: a folder of statistics, its shards, and bad input in one line."""

from __future__ import annotations

import json

import pytest

from moesaic.trace import open_trace
from moesaic.trace.calibration import open_calibration


def test_text_to_statistics_and_trace(moesaic, tiny_moe, tiny_data, tmp_path):
    arguments = ("--data", tiny_data, "--context", 32, "--tiers", "R0,R1,R2", "--by-domain", "--trace", "a.moetrace")
    result = moesaic("calibrate", tiny_moe, *arguments, "-o", "a.moecal", "--json", "--memory", "64KiB")
    assert result.code == 0, result
    facts = json.loads(result.out)
    assert facts["complete"] and facts["layers"] == 2 and set(facts["domains"]) == {"prose", "code"}
    found, trace = open_calibration("a.moecal"), open_trace("a.moetrace")
    assert facts["tokens"] == len(trace) == found.layer(1)["token_count"]
    assert "input_gram_sum" in facts["statistics"]
    assert "exists" in moesaic("calibrate", tiny_moe, *arguments, "-o", "a.moecal").complaint


def test_shards_and_merge(moesaic, tiny_moe, tiny_data, tmp_path):
    common = (tiny_moe, "--data", tiny_data, "--context", 32, "--tiers", "R0")
    for i in range(2):
        assert moesaic("calibrate", *common, "--shard", f"{i}/2", "-o", f"{i}.moecal").code == 0
    result = moesaic("calibrate", "--merge", "0.moecal", "--merge", "1.moecal", "-o", "sum.moecal")
    assert result.code == 0
    assert "busiest expert" in result.out
    parts = [open_calibration(f"{i}.moecal").layer(0)["token_count"] for i in range(2)]
    assert open_calibration("sum.moecal").layer(0)["token_count"] == sum(parts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "DATA"], "--out is missing"),
        (["-o", "a"], "--data is missing"),
        (["--data", "DATA", "-o", "a", "--tiers", "R7"], "tier 'R7'"),
        (["--data", "DATA", "-o", "a", "--memory", "many"], "--memory 'many'"),
        (["--data", "DATA", "-o", "a", "--memory", "1KiB"], "--memory"),
        (["--data", "DATA", "-o", "a", "--shard", "3/2"], "--shard 3/2"),
        (["--data", "DATA", "-o", "a", "--shard", "x"], "--shard 'x'"),
        (["--data", "DATA", "-o", "none/a"], "no folder none"),
        (["--data", "DATA", "-o", "a", "--trace", "none/t"], "none"),
        (["-o", "a", "--merge", "nothing"], "nothing is no calibration"),
    ],
)
def test_bad_input(moesaic, tiny_moe, tiny_data, tmp_path, arguments, words):
    result = moesaic("calibrate", tiny_moe, *[str(tiny_data) if a == "DATA" else a for a in arguments])
    assert words in result.complaint
    assert list(tmp_path.iterdir()) == []
