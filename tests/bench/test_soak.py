"""`moesaic bench soak`: its arithmetic on made-up samples, and a minute of it for real."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moesaic.bench.soak import Options, summary
from moesaic.core.errors import BadInput

MOST_GROWTH = 20 << 20
"""Bytes by which the last third of a minute may lie above the first: allocators settle for longer than that."""


def test_a_leak_shows_and_a_flat_line_is_flat():
    seconds = [2.0 * i for i in range(300)]
    leak = summary(seconds, [int(1e9 + 1e6 * s) for s in seconds])  # 1 MB a second
    assert leak["slope_mb_per_hour"] == pytest.approx(3600, rel=1e-3)
    assert leak["last_third_bytes"] - leak["first_third_bytes"] == pytest.approx(400e6, rel=0.02)
    start = summary(seconds, [int(5e8 if s < 100 else 1e9) for s in seconds])  # grows at first only
    assert abs(start["slope_mb_per_hour"]) < 1e-6
    assert summary([0.0], [7])["first_third_bytes"] == 7


@pytest.mark.parametrize(("how", "words"), [({"size": "no"}, "--size 'no'"), ({"minutes": 0}, "--minutes 0")])
def test_bad_options(tmp_path, how, words):
    with pytest.raises(BadInput, match=words):
        Options(tmp_path, **how).check()


@pytest.mark.slow
def test_a_minute_of_streaming_is_flat(tmp_path):
    command = [sys.executable, "-m", "moesaic", "bench", "soak", "--minutes", "1", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(found)
    assert found["errors"] == 0 and found["requests"] > 5 and found["evictions"] > 0
    assert found["last_third_bytes"] - found["first_third_bytes"] < MOST_GROWTH


@pytest.mark.slow
def test_a_server_answers_clients_that_come_and_go():
    command = [sys.executable, "-m", "moesaic", "bench", "soak", "--server", "--minutes", "0.2", "--json"]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)
    assert result["errors"] == 0, result["first_errors"]
    assert {"chat", "completion", "stream", "leaves", "refused"} <= {*result["answers"]}
    assert result["peak_sample_bytes"] < 2e9
    assert result["metrics"]["moesaic_waiting_jobs"] == 0
