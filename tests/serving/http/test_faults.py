"""What clients do wrong: they leave, read slowly, send nonsense. Nothing is lost and the other requests go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

ASK = {"model": "tiny", "prompt": "the router", "temperature": 0}
LONG = {**ASK, "ignore_eos": True}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(bundled, start, stream):
    server = start(*bundled, names=("tiny",))
    body = json.dumps({**LONG, "max_tokens": 1000, "stream": stream}).encode()
    with socket.create_connection(server.socket.getsockname()) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        while not server.engine.running:
            time.sleep(0.005)
    server.idle(5)
    assert server.engine.meter.outcomes["cancelled"] == 1
    assert server.engine.meter.completion_tokens < 900


def test_sixty_four_clients_of_which_half_disconnect(bundled, start, monkeypatch):
    """The 32 that stay get exactly the text that they would get alone; the 32 that left hold nothing."""
    server = start(*bundled, names=("tiny",), max_rows=16, max_waiting=64)
    submit, jobs = server.engine.submit, []
    monkeypatch.setattr(server.engine, "submit", lambda work: (jobs.extend(work), submit(work))[1])
    prompts = ["Once upon a time", "def f(x):", "It was", "The sea"]
    options = {"temperature": 0, "model": "tiny"}
    expected = {}
    for i, prompt in enumerate(prompts):
        client = server.client()
        expected[prompt] = client.completions.create(prompt=prompt, max_tokens=10 + 5 * i, **options).choices[0].text

    async def stay(client, i):
        prompt = prompts[i % 4]
        fields = {"prompt": prompt, "max_tokens": 10 + 5 * (i % 4), **options}
        if i % 8 < 4:
            stream = await client.completions.create(stream=True, **fields)
            return prompt, "".join([chunk.choices[0].text async for chunk in stream])
        return prompt, (await client.completions.create(**fields)).choices[0].text

    async def leave(client, i):
        fields = {"prompt": prompts[i % 4], "max_tokens": 900, "extra_body": {"ignore_eos": True}, **options}
        try:
            if i % 3:  # some leave while they wait, some in the middle of their text
                stream = await asyncio.wait_for(client.completions.create(stream=True, **fields), 5)
                count = 0
                async for _ in stream:
                    count += 1
                    if count > i % 7:
                        break
                await stream.close()
            else:
                await asyncio.wait_for(client.completions.create(**fields), 0.2 + 0.02 * i)
        except (TimeoutError, openai.APIError):
            return None
        return None

    async def all_of_them():
        limits = httpx.Limits(max_connections=200)
        http = httpx.AsyncClient(limits=limits, timeout=60)
        client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, http_client=http)
        work = [stay(client, i) if i % 2 else leave(client, i) for i in range(64)]
        found = await asyncio.gather(*work)
        await http.aclose()
        return [answer for answer in found if answer]

    answers = asyncio.run(all_of_them())
    assert len(answers) == 32
    for prompt, text in answers:
        assert text == expected[prompt]
    server.idle(10)
    assert not server.engine._batches
    outcomes = server.engine.meter.outcomes
    assert outcomes["done"] == 4 + 32
    # On a slow machine a client may leave before its request was read; what was read has one outcome, and is over.
    assert outcomes["done"] + outcomes["cancelled"] == len(jobs) <= 4 + 64
    assert outcomes["cancelled"] > 0 and all(job.over for job in jobs)
    assert outcomes["failed"] == outcomes["refused"] == 0


def test_a_slow_reader_holds_up_no_one_and_misses_nothing(bundled, start):
    server = start(*bundled, names=("tiny",), send_buffer=8192)
    # Log-probabilities make the answer larger than the socket's buffers.
    fields = {**LONG, "max_tokens": 150, "logprobs": 20, "stream": True}
    expected = server.post("/v1/completions", {**fields, "stream": False}).json()["choices"][0]["text"]
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.connect(server.socket.getsockname())
    body = json.dumps(fields).encode()
    slow.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
    )
    while not server.engine.running:
        time.sleep(0.005)
    began = time.monotonic()
    quick = server.post("/v1/completions", {**LONG, "max_tokens": 20}).json()
    assert quick["usage"]["completion_tokens"] == 20
    server.idle(60)  # the row is free although not a byte was read
    assert time.monotonic() - began < 60
    slow.settimeout(30)
    parts = []
    while part := slow.recv(65536):
        parts.append(part)
    slow.close()
    events = [json.loads(line[6:]) for line in _unchunked(b"".join(parts)).splitlines() if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == expected
    assert b"data: [DONE]" in parts[-1] + parts[-2] if len(parts) > 1 else parts[-1]


def _unchunked(answer):
    body, out = answer.split(b"\r\n\r\n", 1)[1], []
    while body:
        size, body = body.split(b"\r\n", 1)
        out.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(out)


def test_a_reader_that_takes_nothing_is_dropped(bundled, start):
    server = start(*bundled, names=("tiny",), service={"write_timeout": 0.5}, send_buffer=8192)
    fields = {**LONG, "prompt": ["the"] * 4, "max_tokens": 900, "logprobs": 20, "stream": True}
    body = json.dumps(fields).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(server.socket.getsockname())
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        deadline = time.monotonic() + 40
        while not server.engine.meter.outcomes["cancelled"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.idle()
    assert server.engine.meter.outcomes["cancelled"] == 4
    assert server.post("/v1/completions", {**ASK, "max_tokens": 2}).status_code == 200


def test_nonsense_on_the_wire(server):
    for nonsense in (b"\x16\x03\x01\x00\xa5", b"GET\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
                     b"A" * 100_000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000):  # fmt: skip
        with socket.create_connection(server.socket.getsockname(), timeout=10) as connection:
            try:
                connection.sendall(nonsense)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
            except ConnectionError:
                continue
            assert answer == b"" or b" 400 " in answer.split(b"\r\n")[0], answer
    assert httpx.get(server.url + "/health").json()["status"] == "ok"


def test_concurrent_requests_share_steps(server):
    before = server.engine.meter.steps, server.engine.meter.stepped_rows
    texts = {}

    def ask(i):
        texts[i] = server.post("/v1/completions", {**LONG, "model": "bundled", "max_tokens": 30}).json()["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(texts.values())) == 1
    steps, rows = server.engine.meter.steps - before[0], server.engine.meter.stepped_rows - before[1]
    assert rows == 8 * 29
    assert steps < rows / 3


SERVE = [sys.executable, "-m", "moesaic", "serve", "bundled", "--port", "0", "--json", "--threads", "1"]


def _started(*options):
    process = subprocess.Popen([*SERVE, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line, process.stderr.read()
    facts = json.loads(line)
    assert (facts["dtype"], facts["exact"]) == ("float32", True), "a small model on a CPU is widened"
    url = facts["url"]
    deadline = time.monotonic() + 20
    while True:
        try:
            assert httpx.get(url + "/health").status_code == 200
            return process, url
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_requests_finish(how):
    process, url = _started("--grace", "20")
    try:
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model="bundled", prompt="Once", max_tokens=150, stream=True, temperature=0, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [next(stream)]
        os.kill(process.pid, how)
        chunks += list(stream)
        assert chunks[-1].usage.completion_tokens == 150
        assert process.wait(15) == 0
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        process.kill()


@pytest.mark.slow
def test_after_the_grace_a_request_ends_with_a_clean_error():
    process, url = _started("--grace", "0.5")
    try:
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
        options = {"model": "bundled", "prompt": "Once", "max_tokens": 1000, "extra_body": {"ignore_eos": True}}
        waiting: dict = {}
        whole = threading.Thread(target=lambda: waiting.update(answer=_status(client, options)))
        stream = client.completions.create(stream=True, **options)
        next(stream)
        whole.start()
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        whole.join()
        assert waiting["answer"] == 503
        assert process.wait(10) == 0
        assert time.monotonic() - began < 6
    finally:
        process.kill()


def _status(client, options):
    try:
        client.completions.create(**options)
    except openai.APIStatusError as error:
        return error.status_code
    return 200
