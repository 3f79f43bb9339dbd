"""`moesaic serve --tune` and `--lossy`, through the real command: what is chosen, what is answered, what `/stats` says."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

pytestmark = pytest.mark.slow

ASK = {"model": "tiny", "prompt": "The router", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@contextlib.contextmanager
def served(folder, *options):
    """The first line that the server prints, as JSON."""
    arguments = ["serve", str(folder), "--name", "tiny", "--port", "0", "--json", "--dtype", "float32", *map(str, options)]
    code = f"from moesaic.cli.main import main; main({arguments!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    try:
        yield json.loads(server.stdout.readline())
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def text_of(url):
    return httpx.post(f"{url}/v1/completions", json=ASK, timeout=60).json()["choices"][0]["text"]


def test_tune_chooses_a_policy_and_answers_stay_exact(tiny_moe, tmp_path):
    data = tmp_path / "text.txt"
    data.write_text("the router sends a token to the experts\n" * 30)
    with served(tiny_moe) as facts:
        expected = text_of(facts["url"])
        assert httpx.get(f"{facts['url']}/stats").json()["streaming"] is None
    with served(tiny_moe, "--resident", 0.5, "--tune", "--data", data) as facts:
        assert facts["exact"] is True
        assert text_of(facts["url"]) == expected
        live = httpx.get(f"{facts['url']}/stats").json()["streaming"]
        assert live["policy"] and live["accesses"] >= live["hits"] > 0 and live["expert_resident_bytes"] > 0
        assert "overlap" not in live


def test_experts_above_host_memory_answer_the_same(tiny_moe):
    with served(tiny_moe) as facts:
        expected = text_of(facts["url"])
    tier = ("--device", "stand-in", "--device-memory", "64KiB")
    for below in ((), ("--resident", 0.5)):
        with served(tiny_moe, *tier, *below) as facts:
            assert facts["exact"] is True
            assert text_of(facts["url"]) == expected
            live = httpx.get(f"{facts['url']}/stats").json()["streaming"]
            assert live["accesses"] > 0


def test_a_lossy_mode_is_labelled_and_its_overlap_is_live(tiny_moe):
    with served(tiny_moe, "--resident", 0.5, "--policy", "none", "--lossy", "skip:threshold=0.9") as facts:
        assert facts["exact"] is False
        assert facts["lossy"] == {"mode": "skip", "options": facts["lossy"]["options"]}
        before = httpx.get(f"{facts['url']}/stats").json()["streaming"]
        assert before["overlap"] is None
        assert text_of(facts["url"])
        after = httpx.get(f"{facts['url']}/stats").json()["streaming"]
        assert 0 < after["overlap"] < 1
        assert after["lossy"]["mode"] == "skip"
