"""Starting and stopping: uvicorn in front of an engine, and an end in which no request is left without an answer."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol

import uvicorn

from moesaic.core.errors import BadInput

log = logging.getLogger("moesaic.serve")
MARGIN = 5.0
"""Seconds after the grace period in which the last errors reach their clients."""


class Runs(Protocol):
    """What a server starts, closes and waits for: an engine, or a fleet of them."""

    def start(self) -> None: ...
    def close(self, grace: float = 0.0) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...


class Server(uvicorn.Server):
    """On SIGINT or SIGTERM: nothing new; running requests have `grace` seconds, then a clean error. A second one ends all."""

    def __init__(self, app: Any, engine: Runs, *, grace: float = 30.0, access_log: bool = False) -> None:
        config = uvicorn.Config(
            app,
            log_level="info" if access_log else "warning",
            access_log=access_log,
            timeout_graceful_shutdown=int(grace + MARGIN),
            timeout_keep_alive=30,
            h11_max_incomplete_event_size=64 << 10,
            lifespan="on",
            server_header=False,
        )
        super().__init__(config)
        self.engine, self.grace = engine, grace

    def handle_exit(self, sig: int, frame: Any) -> None:
        # Not uvicorn's own, which raises the signal again at the end: a clean end is exit code 0.
        if self.should_exit:
            self.force_exit = True
            self.grace = 0.0
        self.quit()

    def quit(self) -> None:
        """What a signal does, for who runs the server in a thread."""
        self.should_exit = True
        self.engine.close(self.grace)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.close(self.grace)
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that its port is known before the server starts. Raises BadInput when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        raise BadInput(f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}") from error
    return found


def serve(server: Server, bound: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
    """Run until a signal or `server.quit()`; the engine has ended too when this returns."""
    server.engine.start()
    try:
        ready()
        server.run(sockets=[bound])
    finally:
        server.engine.close()
        server.engine.join(MARGIN)
        bound.close()
