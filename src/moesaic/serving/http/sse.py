"""Server-sent events that end when the client does: a closed connection or a reader that takes nothing ends the work."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response

from moesaic.serving.http.bridge import gone
from moesaic.serving.http.errors import ApiError

log = logging.getLogger("moesaic.serve")
DONE = b"data: [DONE]\n\n"


def encode(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


class EventStream(Response):
    """Sends events as they come, then [DONE]; an error becomes one last event of OpenAI's error shape.

    Args:
        on_end: called once, however the stream ends.
        write_timeout: seconds in which the client must take what was written.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], on_end: Callable[[], None], write_timeout: float) -> None:
        self.status_code, self.background = 200, None
        self._events, self._on_end, self._write_timeout = events, on_end, write_timeout
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pump = asyncio.create_task(self._pump(send))
        watcher = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({pump, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        except TimeoutError:
            log.warning("a client took nothing for %g seconds: dropped", self._write_timeout)
        finally:
            for task in (pump, watcher):
                task.cancel()
            self._on_end()

    async def _pump(self, send: Any) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            message = {"type": "http.response.body", "body": body, "more_body": more}
            async with asyncio.timeout(self._write_timeout):
                await send(message)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await write(encode(event))
        except ApiError as error:
            await write(encode(error.body()), more=False)
            return
        await write(DONE, more=False)
