"""The application: endpoints, limits, and errors in OpenAI's shape."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import moesaic
from moesaic.serving.http import chat, completions, embeddings, live, metrics, models
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.limits import Gate
from moesaic.serving.http.service import Service

log = logging.getLogger("moesaic.serve")
BODY = 4 << 20
_ALTERNATIVE = re.compile(r"[\[-]|^(str|int|float|bool)$")
"""Names that pydantic gives to the types of one field, such as `list[str]`: nothing that a client wrote."""


def build(service: Service, *, keys: Sequence[str] = (), max_body: int = BODY, body_timeout: float = 30.0) -> FastAPI:
    """The ASGI application of a service. The engine is started and closed by who owns it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.prompts.close()

    # The interactive documentation of FastAPI loads scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="moesaic", version=moesaic.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.state.registry = metrics.registry(service.engine)
    for part in (chat, completions, embeddings, models, metrics, live):
        app.include_router(part.router)
    answer_errors(app)
    meter = service.engine.meter
    app.add_middleware(Gate, keys=keys, max_body=max_body, body_timeout=body_timeout, meter=meter)
    return app


def answer_errors(app: FastAPI) -> None:
    """Errors of all kinds in OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)


def _json(error: ApiError, headers: Any = None) -> Response:
    return JSONResponse(error.body(), error.status, headers={**(headers or {}), **error.headers})


async def _api_error(request: Request, error: Any) -> Response:
    return _json(error)


async def _invalid(request: Request, error: Any) -> Response:
    """One thing that is wrong, named by its place; what the client sent is not repeated.

    A field that may be of several types has an error for each: one about a value means that its type was right.
    """
    first = max(error.errors(), key=lambda found: (not found["type"].endswith("_type"), len(found["loc"])))
    place = ".".join(str(part) for part in first["loc"][1:] if not _ALTERNATIVE.search(str(part)))
    kind = first["type"]
    if kind == "json_invalid":
        return _json(ApiError(400, "the body is not valid JSON", code="invalid_json"))
    message = {"extra_forbidden": "is not a field of this request", "missing": "is missing"}.get(kind, first["msg"])
    return _json(ApiError(400, f"{place or 'the body'}: {message}", param=place or None, code="invalid_value"))


async def _http_error(request: Request, error: Any) -> Response:
    what = {404: f"nothing at {request.url.path}", 405: f"{request.method} is not allowed at {request.url.path}"}
    return _json(ApiError(error.status_code, what.get(error.status_code, str(error.detail))), error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    return _json(ApiError(500, "the server failed on this request; see its log"))
