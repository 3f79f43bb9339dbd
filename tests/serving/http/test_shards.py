"""A server whose experts lie on disk, and the disk misbehaves: the request is told, and the server goes on."""

from __future__ import annotations

import os
import threading
import time

import pytest

from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.packing import pack
from moesaic.store import Reader
from moesaic.view import quiet

ASK = {"model": "tiny", "prompt": "the router", "temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(autouse=True)
def silent():
    with quiet():
        yield


class Faults:
    """os.preadv with a fault that can be switched on."""

    def __init__(self):
        self.fault = None

    def __call__(self, fd, buffers, offset):
        return os.preadv(fd, buffers, offset) if self.fault is None else self.fault(fd, buffers, offset)


@pytest.fixture
def packed(tiny_moe, tmp_path):
    pack(tiny_moe, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def serve(start):
    """`serve(folder, reader)`: a server that keeps no expert in memory, and the model behind it."""
    opened = []

    def begin(folder, reader):
        streamed = load_streamed(folder, resident=0.5, policy="none", reader=reader)
        opened.append(streamed)
        return start(streamed.model, streamed.tokenizer, names=("tiny",))

    yield begin
    for streamed in opened:
        streamed.close()


def text(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def refusal(answer):
    assert answer.status_code == 500, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "weights_unreadable")
    return error["message"]


def test_a_file_cut_while_serving_is_named_and_the_next_request_works(packed, serve):
    server = serve(packed, Reader("keep"))
    expected = text(server.post("/v1/completions", ASK))
    path = packed / "experts-00001-of-00001.safetensors"
    whole = path.read_bytes()
    os.truncate(path, 8192)
    message = refusal(server.post("/v1/completions", ASK))
    assert "experts-00001-of-00001.safetensors at byte" in message and "mlp.experts." in message and "cut short" in message
    path.write_bytes(whole)
    assert text(server.post("/v1/completions", ASK)) == expected
    assert server.engine.meter.outcomes["failed"] == 1


def test_a_read_that_fails_takes_down_the_request_that_is_written_and_no_other(packed, serve):
    """The fault comes in the middle of one answer while others wait for their turn."""
    faults = Faults()
    server = serve(packed, Reader("keep", read_at=faults))
    expected = text(server.post("/v1/completions", ASK))
    struck = threading.Event()

    def once(fd, buffers, offset):
        if not struck.is_set():
            struck.set()
            raise OSError(5, os.strerror(5))
        return os.preadv(fd, buffers, offset)

    answers = []
    long = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", {**ASK, "max_tokens": 50})))
    long.start()
    while not server.engine.running:
        time.sleep(0.002)
    faults.fault = once
    long.join(60)
    assert "Input/output error" in refusal(answers[0])
    assert text(server.post("/v1/completions", ASK)) == expected


def test_a_read_that_hangs_is_an_error_after_its_time_and_the_others_are_answered(packed, serve):
    faults, release = Faults(), threading.Event()

    def hang(fd, buffers, offset):
        release.wait(30)
        return os.preadv(fd, buffers, offset)

    server = serve(packed, Reader("keep", threads=2, timeout=0.5, read_at=faults))
    expected = text(server.post("/v1/completions", ASK))
    faults.fault = hang
    answers = []
    first = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", ASK)))
    first.start()
    first.join(30)
    assert "no answer for 0.5 s" in refusal(answers[0])
    faults.fault = None
    release.set()
    for _ in range(2):
        assert text(server.post("/v1/completions", ASK)) == expected
