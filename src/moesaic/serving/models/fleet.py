"""Several served models under one budget: who may use one now, who waits until it is loaded, who must make room.

A request leases its model. Models in memory are leased at once; for the others the largest group goes first, and one that
waited longer than `max_wait` before all: then no new lease is given until running requests have ended and it has its room.
Running requests of a model that must leave finish first. All methods run in the event loop; models load in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moesaic.core.errors import MoesaicError
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.errors import ApiError, closing, timed_out
from moesaic.serving.http.service import Service
from moesaic.serving.models.cache import CachedModel, ModelCache, Tier
from moesaic.serving.models.queue import Waiting, next_group

log = logging.getLogger("moesaic.serve")
Lease = tuple[float, "asyncio.Future[Served]"]


@dataclass(eq=False)
class Served:
    """A model that is loaded: its engine, which runs, and the application that answers for it."""

    service: Service
    app: Any

    @property
    def engine(self) -> Engine:
        return self.service.engine


class Fleet:
    """Leases on the models of a `ModelCache` whose objects are `Served`.

    Args:
        models: what can be asked for; `load` starts the engine.
        budget: bytes of weights in memory.
        max_wait: seconds after which a waiting request takes precedence over models in memory.
        timeout: seconds that a request may wait for its model.
        max_waiting: requests that may wait for a model to be loaded; more are refused with 429.
    """

    def __init__(
        self,
        models: list[CachedModel],
        budget: int,
        *,
        policy: str = "lru",
        max_wait: float = 10.0,
        timeout: float = 600.0,
        max_waiting: int = 64,
    ) -> None:
        self.cache = ModelCache(models, [Tier("ram", budget)], policy=policy, on_drop=self._end)
        self.names = list(self.cache.models)
        self.max_wait, self.timeout, self.max_waiting = max_wait, timeout, max_waiting
        self.created = int(time.time())
        self.requests: Counter[str] = Counter()
        self._waiting: dict[str, deque[Lease]] = {}
        self._load: asyncio.Task[None] | None = None
        self._loader = ThreadPoolExecutor(1, "moesaic-models")
        self._timer: asyncio.TimerHandle | None = None
        self._served: dict[str, Served] = {}
        self._grace: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.alive = False

    # What a server asks of an engine: see http.server.

    def start(self) -> None:
        self.alive = True

    @property
    def closing(self) -> bool:
        return self._grace is not None

    def close(self, grace: float = 0.0) -> None:
        """Take nothing new; engines give running requests `grace` seconds, and requests that wait for a model fail."""
        self._grace = grace
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pump)  # it may be a signal, or another thread, that closes
        for served in list(self._served.values()):
            served.engine.close(grace)

    def join(self, timeout: float | None = None) -> None:
        """After `close`: wait for engines, and let all models go."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        for served in list(self._served.values()):
            served.engine.join(timeout)
        self.cache.close()
        self.alive = False

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    async def lease(self, name: str) -> Served:
        """The model, loaded, which stays until `release`. Raises ApiError: 404, 408 after `timeout`, 429, 500, 503."""
        if name not in self.cache.models:
            raise ApiError(
                404, f"no model {name!r} here: this server has {', '.join(self.names)}", param="model", code="model_not_found"
            )
        if self.closing:
            raise closing()
        if self.waiting >= self.max_waiting and not self.cache.is_ready(name):
            raise ApiError(429, f"{self.waiting} requests are waiting for a model already", code="queue_full", retry_after=5)
        self.requests[name] += 1
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Served] = self._loop.create_future()
        self._waiting.setdefault(name, deque()).append((time.monotonic(), future))
        self._pump()
        try:
            async with asyncio.timeout(self.timeout):
                return await asyncio.shield(future)
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.done() and not future.cancelled() and future.exception() is None:
                self.release(name)  # it was given in the very moment in which its request gave up
            future.cancel()
            self._pump()
            if isinstance(error, TimeoutError):
                raise timed_out(self.timeout) from error
            raise

    def release(self, name: str) -> None:
        """The request is over."""
        self.cache.release(name)
        self._pump()

    def _groups(self) -> dict[str, Waiting]:
        """Who waits, without those who gave up."""
        for name, held in list(self._waiting.items()):
            kept = deque(lease for lease in held if not lease[1].done())
            if kept:
                self._waiting[name] = kept
            else:
                del self._waiting[name]
        return {name: Waiting(name, len(held), held[0][0]) for name, held in self._waiting.items()}

    def _pump(self) -> None:
        """Give what can be given, and begin to load what is next."""
        groups, now = self._groups(), time.monotonic()
        if self.closing:
            for name in groups:
                self._refuse(name, closing())
            return
        absent = [group for name, group in groups.items() if not self.cache.is_ready(name)]
        held_up = self._load is None and any(now - group.oldest > self.max_wait for group in absent)
        if not held_up:
            for name in groups.keys() - {group.model for group in absent}:
                self._grant(name)
        if self._load is not None or not absent:
            return
        chosen = next_group(absent, (), now, self.max_wait)
        if self.cache.can_enter(chosen):
            # Room is booked at once: whatever is given from now on is not in its way.
            self._load = asyncio.get_running_loop().create_task(self._bring(chosen, self.cache.reserve(chosen)))
            if held_up:
                self._pump()
        elif not held_up and self._timer is None:
            until = max(0.0, min(group.oldest for group in absent) + self.max_wait - now) + 0.01
            self._timer = asyncio.get_running_loop().call_later(until, self._late)

    def _late(self) -> None:
        self._timer = None
        self._pump()

    def _grant(self, name: str) -> None:
        for _, future in self._waiting.pop(name):
            if not future.done():
                future.set_result(self.cache.acquire(name))

    def _refuse(self, name: str, error: ApiError) -> None:
        for _, future in self._waiting.pop(name, ()):
            if not future.done():
                future.set_exception(error)

    async def _bring(self, name: str, bring: Callable[[], Served]) -> None:
        """Load a model and lease it to all who wait for it."""
        loop = asyncio.get_running_loop()
        try:
            served = await loop.run_in_executor(self._loader, bring)
        except Exception as error:
            log.exception("loading %s failed", name)
            said = str(error) if isinstance(error, MoesaicError) else "see the server's log"
            self._groups()
            self._refuse(name, ApiError(500, f"{name} could not be loaded: {said}", code="model_not_loaded"))
            self._load = None
        else:
            self._served[name] = served
            self._load = None
            if self.closing:
                served.engine.close(self._grace or 0.0)
            elif name in self._groups():
                self._grant(name)
            self.cache.release(name)
        self._pump()

    def _end(self, name: str, served: Served) -> None:
        """The engine of a model that leaves: nothing runs on it any more, and nothing may keep its weights."""
        self._served.pop(name, None)
        served.engine.close()
        served.engine.join(30)
        served.service.prompts.close()

    def facts(self) -> dict[str, Any]:
        """Sizes and counts, for /stats: no prompt and no answer is in it."""
        stats = self.cache.stats[0]
        ready = dict(self._served)
        return {
            "budget_bytes": self.cache.tiers[0].capacity,
            "resident_bytes": self.cache.used_bytes(),
            "most_resident_bytes": stats.most_bytes,
            "hits": stats.hits,
            "loads": stats.loads,
            "evictions": stats.evictions,
            "load_seconds": stats.load_seconds,
            "waiting": self.waiting,
            "models": [
                {
                    "name": name,
                    "bytes": known.bytes,
                    "pinned": known.pinned,
                    "resident": name in ready,
                    "requests": self.requests[name],
                    "waiting": len(self._waiting.get(name, ())),
                    "running": ready[name].engine.running if name in ready else 0,
                }
                for name, known in self.cache.models.items()
            ],
        }


def serving(build: Callable[[], tuple[Service, Any]]) -> Callable[[], Served]:
    """The `load` of a CachedModel, from what makes its service and application."""

    def load() -> Served:
        served = Served(*build())
        served.engine.start()
        return served

    return load
