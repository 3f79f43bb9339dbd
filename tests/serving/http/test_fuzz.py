"""Requests made from the server's own schema, valid and broken: none is answered with 5xx, and answers fit the schema."""

from __future__ import annotations

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/models/{name}", "/v1/models", "/stats", "/health"]


@pytest.fixture(scope="module")
def schema(tiny):
    from .conftest import running

    with running(*tiny, service={"timeout": 5}) as server:
        found = schemathesis.openapi.from_url(server.url + "/openapi.json")
        found.server = server
        yield found


def test_the_schema_names_every_path(schema):
    assert set(PATHS) <= set(schema.raw_schema["paths"])
    assert set(schema.raw_schema["paths"]) - set(PATHS) == {"/metrics"}


CASES = [(path, GenerationMode.POSITIVE) for path in PATHS] + [(path, GenerationMode.NEGATIVE) for path in PATHS[:3]]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "mode"), CASES, ids=[f"{path}-{mode.value}" for path, mode in CASES])
def test_no_request_is_answered_with_5xx(schema, path, mode):
    operation = next(iter(schema[path].values()))
    count = 60 if operation.method.upper() == "POST" else 10
    seen: dict[int, int] = {}

    def fix(body):
        """Most drawn prompts, names and sizes end at the first check; a share of the requests must come through."""
        if not isinstance(body, dict) or mode is not GenerationMode.POSITIVE:
            return body
        body = {name: _whole(value) for name, value in body.items()} | {"model": "tiny"}
        drawn = len(str(body))
        for field in ("prompt", "input"):
            if field in body and drawn % 3:
                body[field] = ["x", ["x", "the router"], [1, 2, 3], [[5], [6, 7]]][drawn % 4]
        for field in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(field), int):
                body[field] = 1 + body[field] % 8
        if isinstance(body.get("n"), int):
            body["n"] = 1 + body["n"] % 4
        if drawn % 2:
            body.pop("routing", None)
        elif body.get("logit_bias"):
            body["logit_bias"] = {str(drawn * (i + 1) % 600): bias for i, bias in enumerate(body["logit_bias"].values())}
        return body

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def attempt(case):
        case.body = fix(case.body) if case.body is not None else case.body
        answer = case.call(timeout=30)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        streamed = "event-stream" in str(answer.headers.get("content-type"))
        case.validate_response(
            answer, checks=[not_a_server_error, *([] if streamed else [response_schema_conformance])], additional_checks=[]
        )

    attempt()
    assert seen
    if mode is GenerationMode.POSITIVE and operation.method.upper() == "POST":
        assert seen.get(200, 0) > 0, f"no request came through: {seen}"
    server = schema.server
    server.idle()
    assert server.engine.alive
    assert server.engine.meter.outcomes["failed"] == 0
    answer = httpx.post(server.url + "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
    assert answer.status_code == 200


def _whole(value):
    """1.0 is an integer to JSON Schema and none to this server."""
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
