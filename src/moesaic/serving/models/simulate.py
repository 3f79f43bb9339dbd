"""How long a stream of requests over many models takes, before anything is loaded: one machine, one request at a time.

    seconds of a request = t_router + [miss] t_switch(model) + prompt tokens x t_prefill + new tokens x t_decode
    t_switch(model) = latency + bytes / bandwidth of the slower tier

N requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.serving.models.queue import Waiting, next_group
from moesaic.serving.models.residency import Residency


@dataclass(frozen=True)
class Request:
    """One request; `arrival` in seconds."""

    model: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    arrival: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds: of the router per request, of a token read and a token written; bytes per second and latency of a switch."""

    router: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    bytes_per_second: float = 1e9
    latency: float = 0.0

    def __post_init__(self) -> None:
        if min(self.router, self.prefill, self.decode, self.latency) < 0 or not self.bytes_per_second > 0:
            raise BadInput(f"{self}: seconds are 0 or more, the bandwidth is more than 0")

    def switch(self, size: int) -> float:
        """Seconds to bring a model of that size in. What leaves is dropped: weights are never written back."""
        return self.latency + size / self.bytes_per_second

    def request(self, request: Request, size: int, miss: bool) -> float:
        """Seconds of one request on a free machine."""
        work = request.prompt_tokens * self.prefill + request.new_tokens * self.decode
        return self.router + (self.switch(size) if miss else 0.0) + work


@dataclass(frozen=True)
class Outcome:
    """What a stream came to. Arrays are in the order of the requests given; `order_N` is that in which they were served."""

    order_N: np.ndarray
    miss_N: np.ndarray
    start_N: np.ndarray
    end_N: np.ndarray
    arrival_N: np.ndarray
    most_bytes: int

    @property
    def switches(self) -> int:
        return int(self.miss_N.sum())

    @property
    def seconds(self) -> float:
        """From the first arrival to the last answer."""
        return float(self.end_N.max() - self.arrival_N.min())

    @property
    def latency_N(self) -> np.ndarray:
        return self.end_N - self.arrival_N

    def row(self) -> dict[str, Any]:
        """As keys of a JSON object."""
        return {
            "requests": len(self.order_N),
            "switches": self.switches,
            "seconds": self.seconds,
            "mean_latency_seconds": float(self.latency_N.mean()),
            "p95_latency_seconds": float(np.quantile(self.latency_N, 0.95)),
            "longest_latency_seconds": float(self.latency_N.max()),
            "most_bytes": self.most_bytes,
        }


def simulate(
    requests: Sequence[Request],
    sizes: Mapping[str, int],
    capacity: int,
    costs: Costs | None = None,
    *,
    policy: str = "lru",
    pinned: Sequence[str] = (),
    window: int = 1,
    max_wait: float = float("inf"),
) -> Outcome:
    """Serve `requests` event by event: whenever the machine is free, `queue.next_group` picks among those that have come.

    `capacity` bytes hold models of `sizes`; `window` and `max_wait` (seconds): see `queue`. Raises BadInput.
    """
    costs = costs or Costs()
    unknown = sorted({r.model for r in requests} - sizes.keys())
    if not requests or unknown:
        raise BadInput(f"requests for {', '.join(unknown)}: no such model" if unknown else "a stream without requests")
    if window < 1:
        raise BadInput(f"a queue window of {window} requests: give at least 1")
    residency = Residency(sizes, capacity, policy, pinned)
    future = "future" in residency.policy.needs
    if future and window > 1:
        raise BadInput(
            f"policy {policy} knows the order in which requests come: give it a window of 1, where they are served so"
        )
    come = sorted(range(len(requests)), key=lambda i: requests[i].arrival)
    after = _next_use([requests[i].model for i in come])
    miss_N, start_N, end_N = np.zeros(len(come), bool), np.zeros(len(come)), np.zeros(len(come))
    order: list[int] = []
    waiting: dict[str, list[int]] = {}
    now, taken, most = 0.0, 0, 0

    def fill() -> None:
        nonlocal taken
        while taken < len(come) and taken - len(order) < window and requests[come[taken]].arrival <= now:
            waiting.setdefault(requests[come[taken]].model, []).append(come[taken])
            taken += 1

    while len(order) < len(come):
        if taken == len(order):
            now = max(now, requests[come[taken]].arrival)
        fill()
        groups = [Waiting(name, len(held), requests[held[0]].arrival) for name, held in waiting.items()]
        for i in waiting.pop(next_group(groups, residency.resident(), now, max_wait)):
            request = requests[i]
            hit, _ = residency.touch(request.model, after[len(order)] if future else None)
            miss_N[i], start_N[i] = not hit, now
            now += costs.request(request, sizes[request.model], not hit)
            end_N[i], most = now, max(most, residency.used_bytes)
            order.append(i)
    return Outcome(np.array(order), miss_N, start_N, end_N, np.array([r.arrival for r in requests], np.float64), most)


def _next_use(models: Sequence[str]) -> list[int]:
    """For each request, the position of the next one of the same model; a far number where there is none."""
    found, seen = [1 << 60] * len(models), {}  # type: list[int], dict[str, int]
    for i in range(len(models) - 1, -1, -1):
        found[i] = seen.get(models[i], 1 << 60)
        seen[models[i]] = i
    return found
