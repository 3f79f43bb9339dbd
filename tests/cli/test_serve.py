"""`moesaic serve`: what it refuses before it loads anything. The running server is tested in tests/serving/http."""

from __future__ import annotations

import socket

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
        (("--max-context", 1), "--max-context 1"),
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
