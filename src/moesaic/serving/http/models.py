"""GET /v1/models and /health."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from moesaic.serving.http.answers import ErrorBody, Health, Model, Models
from moesaic.serving.http.service import Service

router = APIRouter()


@router.get("/v1/models", response_model=None, responses={200: {"model": Models}})
async def list_models(request: Request) -> Response:
    """The names that requests may use."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})


@router.get("/v1/models/{name:path}", response_model=None, responses={200: {"model": Model}, "4XX": {"model": ErrorBody}})
async def one_model(request: Request, name: str) -> Response:
    """One of those names; any other is 404."""
    service: Service = request.app.state.service
    service.check_model(name)
    return JSONResponse(_model(service, name))


@router.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 while the engine runs and takes requests, else 503."""
    engine = request.app.state.service.engine
    status = "dead" if not engine.alive else "closing" if engine.closing else "ok"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "moesaic",
        "max_model_len": service.engine.context,
    }
