"""What is refused, with which status, and that nothing breaks by it."""

from __future__ import annotations

import socket
import time

import httpx
import openai
import pytest

from moesaic.core.errors import BadInput
from moesaic.serving import http

ASK = {"model": "bundled", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def error(answer):
    """The error object; fails when the shape is not OpenAI's."""
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"n": 0}, "n"), ({"n": 17}, "n"),
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"rooting": {}}, "rooting"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"), ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"stop": ["a"] * 17}, None), ({"stop": ""}, None), ({"seed": 1 << 64}, "seed"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"), ({"tool_choice": "required"}, "tool_choice"),
        ({"routing": {"k": 0}}, None), ({"routing": {"experts": 3}}, "routing.experts"), ({"model": 7}, "model"),
        ({"logit_bias": {"a": 1}}, None), ({"timeout": -1}, "timeout"),
    ],
)  # fmt: skip
def test_bad_fields_are_400_and_named(server, change, param):
    answer = server.post("/v1/chat/completions", {**ASK, **change})
    assert answer.status_code == 400, answer.text
    found = error(answer)
    assert found["type"] == "invalid_request_error"
    assert param is None or found["param"] == param
    assert found["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"9" * 5000,
        b'{"model":"bundled","messages":[{"role":"user","content":"\\ud800"}]}', b'{"\\ud800": 1}',
        b'{"model":"bundled","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"model":"bundled","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
        b'{"model":"bundled","model":"bundled"}', b'{"model":"bundled","messages":[{"role":"user"}]}x',
    ],
)  # fmt: skip
def test_malformed_bodies_are_400(server, body):
    answer = httpx.post(server.url + "/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error(answer)


def test_a_body_that_does_not_say_it_is_json_is_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a foreign web page may send without asking
        answer = httpx.post(server.url + "/v1/chat/completions", content=b"{}", headers={"content-type": kind})
        assert answer.status_code == 400


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "bundled/../x", "gpt-4", "\x00"])
def test_only_served_names_are_models(server, name):
    """A name is compared and never looked up: no file is opened, nothing is downloaded."""
    answer = server.post("/v1/chat/completions", {**ASK, "model": name})
    assert answer.status_code == 404
    assert error(answer)["code"] == "model_not_found"
    assert "root:" not in answer.text
    for path in ("/v1/models/", "/", "/v1/"):
        listed = _raw(server, f"GET {path}{name.replace(chr(0), '%00')} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b" 404 " in listed.split(b"\r\n")[0], listed
        assert b"root:" not in listed


def _raw(server, request):
    with socket.create_connection(server.socket.getsockname(), timeout=20) as connection:
        connection.sendall(request.encode())
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_other_places_and_methods(server):
    assert error(httpx.get(server.url + "/nothing"))["type"] == "not_found_error"
    answer = httpx.get(server.url + "/v1/chat/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"
    error(answer)


def test_a_prompt_beyond_the_context(server):
    answer = server.post("/v1/completions", {"model": "bundled", "prompt": "word " * 3000})
    assert answer.status_code == 400
    assert error(answer)["code"] == "context_length_exceeded"
    for prompt, complaint in (([8192], "token 8192"), ("", "empty"), ([[]], "at least 1")):
        answer = server.post("/v1/completions", {"model": "bundled", "prompt": prompt})
        assert answer.status_code == 400
        assert complaint in error(answer)["message"]


def test_bodies_have_a_limit(tiny, start):
    server = start(*tiny, app={"max_body": 10_000})
    big = {"model": "tiny", "prompt": "x" * 20_000}
    answer = server.post("/v1/completions", big)
    assert answer.status_code == 413
    assert error(answer)["code"] == "body_too_large"

    def endless():
        for _ in range(40):
            yield b"x" * 1000

    answer = httpx.post(server.url + "/v1/completions", content=endless())  # chunked: no length is announced
    assert answer.status_code == 413
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come(tiny, start):
    server = start(*tiny, app={"body_timeout": 0.3})
    with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in connection.recv(4096).split(b"\r\n")[0]


def test_keys(tiny, start, caplog):
    server = start(*tiny, app={"keys": ["first-key", "second-key"]})
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/models", "/metrics", "/stats"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}):
            answer = httpx.request("POST" if "chat" in path else "GET", server.url + path, json=body, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            error(answer)
    for key in ("first-key", "second-key"):
        assert server.client(key).chat.completions.create(**body).usage.completion_tokens == 1
        assert httpx.get(server.url + "/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client("first-ke").models.list()
    for path in ("/", "/health", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 200
    assert "-key" not in caplog.text
    assert "-key" not in httpx.get(server.url + "/stats", headers={"Authorization": "Bearer first-key"}).text


def test_a_full_queue_is_429_and_passes(bundled, start):
    server = start(*bundled, names=("bundled",), max_rows=1, max_waiting=1)
    client = server.client()
    long = {"model": "bundled", "prompt": "Once", "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(stream=True, **long)
    next(iter(first))
    second = client.completions.create(stream=True, **long)
    while server.engine.waiting < 1:
        time.sleep(0.01)
    with pytest.raises(openai.RateLimitError) as refused:
        client.completions.create(**long)
    assert refused.value.body["code"] == "queue_full"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    first.close(), second.close()
    server.idle()
    assert client.completions.create(model="bundled", prompt="Once", max_tokens=1).choices


def test_timeouts(bundled, start):
    server = start(*bundled, names=("bundled",), service={"timeout": 0.5})
    body = {"model": "bundled", "prompt": "Once", "max_tokens": 1000, "ignore_eos": True}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 408
    assert error(answer)["type"] == "timeout_error"
    with pytest.raises(openai.APIError, match=r"within 0\.3 seconds"):
        list(server.client().completions.create(stream=True, extra_body={"ignore_eos": True, "timeout": 0.3}, **{
            k: v for k, v in body.items() if k != "ignore_eos"}))  # fmt: skip
    server.idle()
    assert server.post("/v1/completions", {**body, "max_tokens": 1}).status_code == 200


def test_a_missing_extra_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(BadInput, match=r"^the server needs uvicorn: pip install 'moesaic\[serve\]'$"):
        http.require()
