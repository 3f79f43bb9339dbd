"""What a client is told when a request fails: OpenAI's shape, `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A failed request: HTTP status, what was wrong, the field it was in, and a code that programs can match."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": clean(self.message), "type": kind, "param": self.param and clean(self.param), "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def clean(text: str) -> str:
    """Text that any JSON encoder takes: a client's lone surrogates must not break the answer about them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def timed_out(seconds: float) -> ApiError:
    return ApiError(408, f"the request was not finished within {seconds:g} seconds", code="timeout")


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
