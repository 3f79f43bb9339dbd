"""Who may ask, and how much: API keys, the size of a body, and the time to send it. Checked before anything is parsed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from typing import Any

from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.meter import Meter

OPEN_PATHS = ("/", "/health", "/openapi.json")
"""Answered without a key: they say nothing about what runs here."""


class Gate:
    """The outermost layer of the application.

    Args:
        keys: a request needs one of these as `Authorization: Bearer KEY`; none given, none needed.
        max_body: bytes of a request's body.
        body_timeout: seconds in which the body must arrive.
    """

    def __init__(self, app: Any, keys: Sequence[str], max_body: int, body_timeout: float, meter: Meter) -> None:
        self.app, self.max_body, self.body_timeout, self.meter = app, max_body, body_timeout, meter
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in _COUNTED else "other"

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.meter.answered(counted, message["status"])
            await send(message)

        try:
            self._check_key(scope, path)
            body = await self._body(scope, receive)
        except ApiError as error:
            await _answer(error, sending)
            if error.status == 413:
                await self._drain(receive)
            return
        if body is None:  # the client left in the middle of its request
            return
        await self.app(scope, replay(body, receive), sending)

    def _check_key(self, scope: Any, path: str) -> None:
        if not self._digests or path in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        mine = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time: the time taken says nothing about which came close.
        matches = [hmac.compare_digest(mine, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Any, receive: Callable) -> bytes | None:
        """The whole body; None when the client went away. Raises ApiError when it is too large or too slow."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self.max_body:
                        raise self._too_large()
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self.body_timeout:g} seconds", code="timeout") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body:,} bytes", code="body_too_large")

    async def _drain(self, receive: Callable) -> None:
        """Take a little of what still comes: a client that is still writing would otherwise never read the answer."""
        left = 4 * self.max_body
        try:
            async with asyncio.timeout(2.0):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


_COUNTED = (
    "/", "/health", "/metrics", "/stats", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings",
)  # fmt: skip


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def replay(body: bytes, receive: Callable) -> Callable:
    """A `receive` that gives a body that was read already, then what comes after it."""
    sent = False

    async def again() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(error: ApiError, send: Callable) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
