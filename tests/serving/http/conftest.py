"""A real server on a free loopback port, in a thread of this process, and clients for it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import httpx
import pytest
import torch

from moesaic.serving.http.app import build
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.server import Server, listen, serve
from moesaic.serving.http.service import Service
from moesaic.view import load

torch.set_num_threads(1)


class Running:
    """A served model: `url`, `engine`, and `client()` for the official OpenAI client."""

    def __init__(self, model, tokenizer, *, names=("tiny",), grace=5.0, service=None, app=None, send_buffer=None, **engine):
        self.engine = Engine(model, tokenizer, threads=1, **engine)
        self.service = Service(self.engine, names, **(service or {}))
        self.server = Server(build(self.service, **(app or {})), self.engine, grace=grace)
        self.socket = listen("127.0.0.1", 0)
        if send_buffer is not None:  # connections inherit it
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=serve, args=(self.server, self.socket), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 20
        while not self.server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def client(self, key="none", **options):
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **options)

    def post(self, path, body, **options):
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def idle(self, seconds=20.0):
        """Wait until nothing runs and nothing waits."""
        deadline = time.monotonic() + seconds
        while self.engine.running or self.engine.waiting:
            assert time.monotonic() < deadline, (self.engine.running, self.engine.waiting)
            time.sleep(0.01)

    def stop(self):
        self.server.grace = 0
        self.server.quit()
        self.thread.join(20)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(*arguments, **options):
    server = Running(*arguments, **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def start():
    """`start(model, tokenizer, ...)`: a server of the test's own, stopped at its end."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(running(*arguments, **options))


@pytest.fixture(scope="package")
def bundled():
    """The bundled model in float32, where batched and single products agree."""
    return load("bundled", dtype="float32")


@pytest.fixture(scope="package")
def tiny(tiny_moe):
    return load(tiny_moe, dtype="float32")


@pytest.fixture(scope="package")
def server(bundled):
    """The bundled model, served for all tests that do not change it."""
    with running(*bundled, names=("bundled", "moesaic")) as found:
        yield found


class Script:
    """Makes a model write given tokens, whatever the prompt: what comes out of the server is then known exactly."""

    def __init__(self, model, ids):
        self.ids, self._start = ids, 0
        self._handle = model.register_forward_hook(self._force, with_kwargs=True)

    def _force(self, module, arguments, given, output):
        positions = given["position_ids"]
        if given["input_ids"].shape[1] > 1:
            self._start = positions.shape[1]
        for row, position in enumerate(positions[:, -1].tolist()):
            at = position + 1 - self._start
            output.logits[row, -1, self.ids[at] if at < len(self.ids) else 0] = 1e4
        return output

    def remove(self):
        self._handle.remove()


@pytest.fixture
def script():
    """`script(model, ids)`, undone after the test."""
    made = []

    def make(model, ids):
        made.append(Script(model, ids))

    yield make
    for entry in made:
        entry.remove()
