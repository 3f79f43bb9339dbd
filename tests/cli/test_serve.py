"""`moesaic serve`: what it refuses before it loads anything. The running server is tested in tests/serving/http."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest


def test_a_port_that_is_taken(moesaic):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot listen on 127.0.0.1" in moesaic("serve", "bundled", "--port", taken.getsockname()[1]).complaint


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--max-rows", 0), "--max-rows 0"), (("--max-waiting", -1), "--max-waiting -1"), (("--max-body", 0), "--max-body"),
        (("--timeout", "nan"), "--timeout nan"), (("--write-timeout", 0), "--write-timeout 0"), (("--grace", -1), "--grace -1"),
        (("--api-key", " "), "--api-key"), (("--api-key", "schlüssel"), "ASCII"), (("--port", 99999), "99999"),
        (("--api-key-file", "no.txt"), "no.txt: No such file"), (("--host", "no such host", "--port", 0), "no such host"),
        (("--max-context", 1), "--max-context 1"), (("--memory", "x"), "--memory 'x'"), (("--resident", 2), "--resident 2"),
        (("--policy", "slru"), "--policy is about experts on disk"),
        (("--resident", 0.5, "--device", "cuda"), "need --device-memory"),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(moesaic, options, complaint):
    assert complaint in moesaic("serve", "bundled", *options).complaint


def test_a_key_file_without_keys_must_not_open_the_server(moesaic, tmp_path):
    (tmp_path / "keys").write_text("\n \n")
    assert "no key in it" in moesaic("serve", "bundled", "--api-key-file", tmp_path / "keys").complaint


def test_a_dense_model_needs_a_word(moesaic, tiny_dense):
    assert "--dense-ok" in moesaic("serve", tiny_dense, "--port", 0).complaint


def test_a_model_that_is_not_there(moesaic):
    assert "no such model folder" in moesaic("serve", "./nothing/here", "--port", 0).complaint


def test_a_missing_extra(moesaic, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert moesaic("serve", "bundled").complaint == "moesaic serve: the server needs fastapi: pip install 'moesaic[serve]'"


def test_experts_on_disk_answer_like_resident_ones(tiny_moe):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("uvicorn")
    answers = []
    for streamed in ((), ("--resident", "0.5", "--policy", "slru")):
        arguments = ["serve", str(tiny_moe), "--name", "tiny", "--port", "0", "--json", "--dtype", "float32", *streamed]
        code = f"from moesaic.cli.main import main; main({arguments!r})"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            url = json.loads(server.stdout.readline())["url"]
            asked = {"model": "tiny", "prompt": "The router", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answers.append(httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()["choices"][0]["text"])
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
    assert answers[0] == answers[1] != ""
