"""A server whose experts lie on disk, and the disk misbehaves: the request is told, and the server goes on."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moesaic.serving.streamed import load_streamed
from moesaic.serving.streamed.packing import pack
from moesaic.store import Reader
from moesaic.store.packed import read_packed
from moesaic.view import load, quiet, view

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


def test_a_read_that_fails_once_is_done_again_and_nobody_notices(packed, serve):
    """The fault comes in the middle of an answer: its step is taken back and done again."""
    faults = Faults()
    server = serve(packed, Reader("keep", read_at=faults))
    ask = {**ASK, "max_tokens": 50}
    expected = text(server.post("/v1/completions", ask))
    struck = threading.Event()

    def once(fd, buffers, offset):
        if not struck.is_set():
            struck.set()
            raise OSError(5, os.strerror(5))
        return os.preadv(fd, buffers, offset)

    answers = []
    long = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", ask)))
    long.start()
    while not server.engine.running:
        time.sleep(0.002)
    faults.fault = once
    long.join(60)
    assert struck.is_set() and text(answers[0]) == expected
    assert server.engine.meter.outcomes["failed"] == 0


def used_by(model, tokenizer, prompt, tokens):
    """(layer, expert) that the prompt alone chooses, and that the tokens written after it choose."""
    seen = []
    with view(model).on_route(lambda routing, block: seen.append((block.layer, set(routing.experts_TK.flatten().tolist())))):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    layers = len(view(model))
    pairs = [{(layer, e) for e in chosen} for layer, chosen in seen]
    return set().union(*pairs[:layers]), set().union(*pairs[layers:])


def concerned(used):
    """An expert, two prompts or fewer whose answers need it though they themselves do not, and two that never need it."""
    for place in sorted(set().union(*(written for _, written in used.values()))):
        hit = [prompt for prompt, (read, written) in used.items() if place in written - read]
        never = [prompt for prompt, (read, written) in used.items() if place not in written | read]
        if hit and len(never) > 1:
            return place, hit[:2], never[:2]
    pytest.fail("no such expert: choose other prompts")


def test_only_requests_that_need_a_broken_expert_fail(packed, serve):
    """Several clients share every step; one expert cannot be read from the middle of their answers on."""
    model, tokenizer = load(packed, dtype="float32")
    model.set_experts_implementation("moesaic")
    tokens = 4
    used = {prompt: used_by(model, tokenizer, prompt, tokens) for prompt in "abcdefghijklmnopqrstuvwxyz"}
    (layer, e), hit, never = concerned(used)
    prompts = [*hit, *never]
    faults = Faults()
    server = serve(packed, Reader("keep", read_at=faults))
    asks = {prompt: {**ASK, "prompt": prompt, "max_tokens": tokens} for prompt in prompts}
    expected = {prompt: text(server.post("/v1/completions", ask)) for prompt, ask in asks.items()}
    found = read_packed(packed)
    block = found.contents.blocks[layer]
    start = found.matrix(block, e, 0).start
    end = start + block.record_bytes(e)

    def broken(fd, buffers, offset):
        if start <= offset < end:
            raise OSError(5, os.strerror(5))
        return os.preadv(fd, buffers, offset)

    faults.fault = broken
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = dict(zip(prompts, clients.map(lambda p: server.post("/v1/completions", asks[p]), prompts), strict=True))
    for prompt, answer in answers.items():
        if prompt in hit:
            assert f"mlp.experts.{e}" in refusal(answer)
        else:
            assert text(answer) == expected[prompt]
    assert server.engine.meter.outcomes["failed"] == len(hit)
    faults.fault = None
    assert {prompt: text(server.post("/v1/completions", ask)) for prompt, ask in asks.items()} == expected


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
