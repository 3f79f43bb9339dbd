"""One OpenAI-compatible address for several models: the `model` of a request says which one answers.

Each model has the application that it would have alone (`http.app`); a request is handed to it, body and all, while it is
leased. Everything about one model, such as routing, tools or streaming, is therefore answered as it is there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import JSONResponse, Response

from moesaic.serving.http.app import BODY, answer_errors
from moesaic.serving.http.bridge import unless_gone
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.limits import Gate, replay
from moesaic.serving.http.live import page_of
from moesaic.serving.http.meter import Meter
from moesaic.serving.models.fleet import Fleet, Served

router = APIRouter()
_OWN = (
    "app",
    "router",
    "endpoint",
    "route",
    "path_params",
    "fastapi_astack",
    "fastapi_inner_astack",
    "fastapi_function_astack",
)
"""What this application wrote into a request's scope: not for the next one."""


def build(fleet: Fleet, *, keys: Sequence[str] = (), max_body: int = BODY, body_timeout: float = 30.0) -> FastAPI:
    """The ASGI application of a fleet, which is started and closed by who owns it."""
    app = FastAPI(title="moesaic", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.fleet = fleet
    app.state.registry = CollectorRegistry(auto_describe=False)
    app.state.registry.register(_Reader(fleet))
    app.include_router(router)
    answer_errors(app)
    app.add_middleware(Gate, keys=keys, max_body=max_body, body_timeout=body_timeout, meter=Meter())
    return app


@router.post("/v1/chat/completions", response_model=None)
@router.post("/v1/completions", response_model=None)
@router.post("/v1/embeddings", response_model=None)
async def forward(request: Request) -> Response:
    """The answer of the model that the request names, which is loaded first where it has to be."""
    fleet: Fleet = request.app.state.fleet
    body = await request.body()
    name = _model_of(body)
    served = await unless_gone(request.receive, asyncio.create_task(fleet.lease(name)))
    return _Forwarded(served, body, lambda: fleet.release(name))


@router.get("/v1/models", response_model=None)
async def list_models(request: Request) -> Response:
    """The names that requests may use, in memory or not."""
    fleet: Fleet = request.app.state.fleet
    return JSONResponse({"object": "list", "data": [_entry(fleet, name) for name in fleet.names]})


@router.get("/v1/models/{name:path}", response_model=None)
async def one_model(request: Request, name: str) -> Response:
    """One of those names; any other is 404."""
    fleet: Fleet = request.app.state.fleet
    if name not in fleet.names:
        raise ApiError(404, f"no model {name!r} here", param="model", code="model_not_found")
    return JSONResponse(_entry(fleet, name))


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """200 while requests are taken, else 503."""
    fleet: Fleet = request.app.state.fleet
    status = "closing" if fleet.closing else "ok" if fleet.alive else "dead"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/", response_model=None)
async def page(request: Request) -> Response:
    """The live page: which models are in memory and who waits, from /stats."""
    return page_of("moesaic.serving.models")


@router.get("/stats", response_model=None)
async def stats(request: Request) -> Response:
    """Which models are in memory, how often they were switched, and who waits."""
    return JSONResponse(request.app.state.fleet.facts(), headers={"Cache-Control": "no-store"})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """The same for Prometheus."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


class _Forwarded(Response):
    """Lets another application answer this request, and ends its lease however that goes."""

    def __init__(self, served: Served, body: bytes, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._served, self._body, self._on_end = served, body, on_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        mine = {key: value for key, value in scope.items() if key not in _OWN}
        try:
            await self._served.app(mine, replay(self._body, receive), send)
        finally:
            self._on_end()


def _model_of(body: bytes) -> str:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not valid JSON", code="invalid_json") from error
    name = given.get("model") if isinstance(given, dict) else None
    if not isinstance(name, str):
        raise ApiError(400, "model: is missing, or no text", param="model", code="invalid_value")
    return name


def _entry(fleet: Fleet, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": fleet.created, "owned_by": "moesaic"}


class _Reader(Collector):
    """Reads the fleet when it is asked."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        facts = self.fleet.facts()
        for key, text in (
            ("loads", "Models brought into memory."),
            ("evictions", "Models that left."),
            ("hits", "Found there."),
        ):
            yield CounterMetricFamily(f"moesaic_models_{key}", text, value=facts[key])
        yield CounterMetricFamily("moesaic_models_load_seconds", "Seconds of loading.", value=facts["load_seconds"])
        yield GaugeMetricFamily("moesaic_models_resident_bytes", "Bytes of models in memory.", value=facts["resident_bytes"])
        yield GaugeMetricFamily("moesaic_models_budget_bytes", "Bytes that they may take.", value=facts["budget_bytes"])
        yield GaugeMetricFamily("moesaic_models_waiting", "Requests that wait for a model.", value=facts["waiting"])
        requests = CounterMetricFamily("moesaic_models_requests", "Requests by model.", labels=["model"])
        for model in facts["models"]:
            requests.add_metric([model["name"]], model["requests"])
        yield requests
