"""`moesaic bench soak --server`: a real server under a budget, several clients for a long time, and the memory of its process.

The clients ask for chat and completions, whole and streamed, short and long; some leave in the middle of a stream, some send
what is refused. Only answers of kinds that nobody asked for count as errors.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from moesaic.bench import machine
from moesaic.bench.soak import Sampler, resident_bytes, show, summary
from moesaic.core.errors import BadInput

TEXT = "the river took a long way to say what snow had told it while the small engine counted its own steps"
"""Prompts are drawn from its words."""

WARM_SECONDS = 20.0
"""Before the first sample: what compiles and allocates once has done so."""


@dataclass
class Options:
    """`share`: of the expert bytes, resident."""

    model: str = "bundled"
    minutes: float = 30.0
    share: float = 0.25
    policy: str = "lru"
    threads: int = 1
    clients: int = 4
    every: float = 2.0

    def check(self) -> None:
        for name, value in (
            ("minutes", self.minutes),
            ("every", self.every),
            ("clients", self.clients),
            ("threads", self.threads),
        ):
            if not value > 0:
                raise BadInput(f"--{name} {value}: give more than 0")


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Memory of the server by thirds of the time, its slope, and what the clients got."""
    options.check()
    header = machine.describe("cpu")
    command = [
        sys.executable, "-m", "moesaic", "serve", options.model, "--resident", str(options.share), "--policy", options.policy,
        "--threads", str(options.threads), "--port", "0", "--json",
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line:
            raise BadInput(f"the server did not start: {' '.join(command)}")
        facts = json.loads(line)
        url = facts["url"]
        crowd = _Clients(url, facts["models"][0], options.clients)
        with crowd:
            time.sleep(min(WARM_SECONDS, 20 * options.minutes))
            with Sampler(options.every, lambda: resident_bytes(server.pid)) as held:
                end = time.monotonic() + 60 * options.minutes
                while (left := end - time.monotonic()) > 0 and server.poll() is None:
                    progress(f"{left / 60:.1f} minutes left, {crowd.seen.total()} requests, {show(held.latest)}")
                    time.sleep(min(1.0, left))
        ended = server.poll()
        metrics = {} if ended is not None else _metrics(url)
    finally:
        server.terminate()
        server.wait(30)
    errors = [f"the server ended with {ended}"] if ended is not None else []
    errors += crowd.errors
    return {
        "machine": header, "model": options.model, "policy": options.policy, "share": options.share, "minutes": options.minutes,
        "clients": options.clients, "requests": crowd.seen.total(), "answers": dict(crowd.seen), "tokens": crowd.tokens,
        "errors": len(errors), "first_errors": errors[:3], **summary(held.seconds, held.bytes), "metrics": metrics,
    }  # fmt: skip


class _Clients:
    """Threads that ask until the `with` block ends."""

    def __init__(self, url: str, model: str, count: int) -> None:
        self.url, self.model, self.seen, self.errors, self.tokens = url, model, Counter[str](), list[str](), 0
        self._end, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._loop, args=(number,), daemon=True) for number in range(count)]

    def __enter__(self) -> _Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(120)

    def _loop(self, number: int) -> None:
        drawn = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self._end.is_set():
                try:
                    kind, tokens = self._ask(client, drawn)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    with self._lock:
                        self.errors.append(f"{type(error).__name__}: {error}")
                    self._end.wait(1)
                    continue
                with self._lock:
                    self.seen[kind] += 1
                    self.tokens += tokens

    def _ask(self, client: httpx.Client, drawn: random.Random) -> tuple[str, int]:
        """One request; what became of it, and the tokens it brought. Raises ValueError for an answer that should not be."""
        prompt = " ".join(drawn.choices(TEXT.split(), k=drawn.choice((1, 8, 40, 120))))
        body: dict[str, Any] = {"model": self.model, "max_tokens": drawn.choice((1, 8, 24)), "seed": drawn.randrange(1000)}
        kind = drawn.choice(("chat", "completion", "stream", "leaves", "refused"))
        if kind == "refused":
            answer = client.post("/v1/completions", json={**body, "prompt": prompt, "max_tokens": -1})
            if answer.status_code not in (400, 422):
                raise ValueError(f"a bad request was answered with {answer.status_code}")
            return kind, 0
        if kind in ("chat", "completion"):
            asked = {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}
            answer = client.post("/v1/chat/completions" if kind == "chat" else "/v1/completions", json={**body, **asked})
            if answer.status_code == 429:
                return "told to wait", 0
            if answer.status_code != 200:
                raise ValueError(f"{kind}: {answer.status_code} {answer.text[:200]}")
            return kind, answer.json()["usage"]["completion_tokens"]
        tokens = 0
        with client.stream("POST", "/v1/completions", json={**body, "prompt": prompt, "stream": True}) as answer:
            if answer.status_code == 429:
                return "told to wait", 0
            if answer.status_code != 200:
                raise ValueError(f"stream: {answer.status_code}")
            for line in answer.iter_lines():
                tokens += line.startswith("data: {")
                if kind == "leaves" and tokens >= 2:
                    break
        return kind, tokens


def _metrics(url: str) -> dict[str, float]:
    """The server's own counters at the end."""
    found = {}
    for line in httpx.get(url + "/metrics", timeout=30).text.splitlines():
        name, _, value = line.rpartition(" ")
        if name and not line.startswith("#") and "{" not in name:
            found[name] = float(value)
    return found
