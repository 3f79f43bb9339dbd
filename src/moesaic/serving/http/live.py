"""GET / and /stats: what the server is doing now, as a page and as the JSON that the page polls."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from moesaic.serving.http.meter import job_row
from moesaic.serving.http.service import Service

router = APIRouter()
MOST_JOBS = 40


@router.get("/", response_model=None, include_in_schema=False)
async def page(request: Request) -> Response:
    """The live page: self-contained, no address but this server's own."""
    return page_of("moesaic.serving.http")


@router.get("/stats", response_model=None, responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}})
async def stats(request: Request) -> Response:
    """Requests, rates and expert use. Sizes and times only: no prompt and no answer is in it."""
    service: Service = request.app.state.service
    engine, meter = service.engine, service.engine.meter
    now = engine.jobs()
    series = meter.per_second()
    return JSONResponse(
        {
            "model": service.names[0],
            "facts": service.facts,
            "uptime_seconds": round(time.time() - meter.began, 1),
            "running": engine.running,
            "waiting": engine.waiting,
            "max_rows": engine.max_rows,
            "max_waiting": engine.max_waiting,
            "context": engine.context,
            "prompt_tokens": meter.prompt_tokens,
            "completion_tokens": meter.completion_tokens,
            "outcomes": dict(meter.outcomes),
            "tokens_per_second": sum(series[-5:]) / 5,
            "series": series,
            "jobs": [job_row(job) for job in now[:MOST_JOBS]],
            "recent": meter.recent(),
            "streaming": None if service.streaming is None else service.streaming(),
            "load": [] if meter.load is None else meter.load.read(),
        },
        headers={"Cache-Control": "no-store"},
    )


def page_of(package: str) -> Response:
    """A package's page.html, held to its own script and style, and to requests to this server."""
    text, policy = _page(package)
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})


@cache
def _page(package: str) -> tuple[str, str]:
    """The page and its policy: its own script and style by their hashes, and requests to this server only."""
    text = resources.files(package).joinpath("page.html").read_text(encoding="utf-8")
    for name in ("live.css", "live.js"):  # what live pages share stands where a comment names it
        shared = resources.files("moesaic.serving.http").joinpath(name).read_text(encoding="utf-8")
        text = text.replace(f"/* {name} */\n", shared)

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)

    return text, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
