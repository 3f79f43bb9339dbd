"""Between the engine's thread and asyncio: a group of jobs whose events are awaited, and which can be given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from moesaic.serving.http.engine import Engine
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.jobs import Done, Event, Failed, Job, Piece

T = TypeVar("T")


class Group:
    """The jobs of one HTTP request. The queue needs no bound: an answer is at most max_tokens long, read or not."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.jobs: Sequence[Job] = ()
        self.prompt_tokens = self.completion_tokens = 0

    def deliver(self, number: int) -> Callable[[Event], None]:
        """The callback for job `number`, called in the engine's thread."""

        def deliver(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:  # the loop has ended: nobody waits for this any more
                return

        return deliver

    def submit(self, jobs: Sequence[Job]) -> None:
        """Raises ApiError when the engine takes no more."""
        self._engine.submit(jobs)
        self.jobs = jobs

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(job number, piece) as they come. Raises ApiError when a job fails; the others are then given up."""
        open_jobs = len(self.jobs)
        while open_jobs:
            number, event = await self._events.get()
            if isinstance(event, Piece):
                yield number, event
            elif isinstance(event, Done):
                open_jobs -= 1
                self.prompt_tokens += event.prompt_tokens
                self.completion_tokens += event.completion_tokens
            elif isinstance(event, Failed):
                self.cancel()
                raise event.error

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }

    def cancel(self) -> None:
        """Give up what is unfinished; harmless when everything is."""
        unfinished = [job for job in self.jobs if not job.over]
        if unfinished:
            self._engine.cancel(unfinished)


async def gone(receive: Callable) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Callable, work: asyncio.Task[T]) -> T:
    """The result of `work`; it is cancelled, and ApiError 499 raised, when the client leaves first."""
    watcher = asyncio.create_task(gone(receive))
    try:
        await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ApiError(499, "the client has gone", code="cancelled")
    finally:
        for task in (work, watcher):
            task.cancel()
