"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from moesaic.serving.http.answers import ChatCompletion, ErrorBody
from moesaic.serving.http.bridge import Group, unless_gone
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.jobs import Piece, TokenText
from moesaic.serving.http.prompts import FALLBACK_STOP
from moesaic.serving.http.schemas import ChatRequest
from moesaic.serving.http.service import Service, new_id
from moesaic.serving.http.sse import EventStream
from moesaic.serving.http.token_text import token_bytes
from moesaic.serving.http.tool_calls import ToolCalls

router = APIRouter()


@router.post(
    "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}, "4XX": {"model": ErrorBody}}
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """An answer to a conversation, whole or as a stream of server-sent events."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    tools = None if body.tool_choice == "none" else body.tools
    ids = await service.prompts.run(service.prompts.chat, body.messages, tools)
    group = service.begin(
        body,
        [ids],
        "chat",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        stop=() if service.prompts.has_template else (FALLBACK_STOP,),
    )
    answer = _Answer(service, body, group, in_tags=bool(tools) and service.prompts.calls_tools_in_tags)
    if body.stream:
        return EventStream(answer.chunks(), group.cancel, service.write_timeout)
    try:
        return JSONResponse(await unless_gone(request.receive, asyncio.create_task(answer.whole())))
    finally:
        group.cancel()


class _Answer:
    """Pieces of a group of answers, put into chunks or into one object."""

    def __init__(self, service: Service, body: ChatRequest, group: Group, in_tags: bool) -> None:
        self.service, self.body, self.group = service, body, group
        self.calls = [ToolCalls() for _ in range(body.n or 1)] if in_tags else None
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        more: dict[str, Any] = {"usage": None} if usage else {}
        for index in range(self.body.n or 1):
            yield self._chunk(index, {"role": "assistant", "content": ""}) | more
        async for _, piece in self.group.pieces():
            text, calls = self._split(piece)
            if text or piece.tokens:
                yield self._chunk(piece.index, {"content": text}, self._logprobs(piece.tokens)) | more
            if calls:
                delta = {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}
                yield self._chunk(piece.index, delta) | more
            if piece.reason:
                reason = "tool_calls" if calls else piece.reason
                yield self._chunk(piece.index, {}, None, reason, piece.notes) | more
        if usage:
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.group.usage()}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None,
        notes: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if notes is not None:
            choice["steering"] = notes
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    async def whole(self) -> dict[str, Any]:
        n = self.body.n or 1
        texts, tokens = [""] * n, [[] for _ in range(n)]  # type: list[str], list[list[TokenText]]
        reasons: list[str | None] = [None] * n
        notes: list[dict[str, Any] | None] = [None] * n
        called: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        async for _, piece in self.group.pieces():
            text, calls = self._split(piece)
            texts[piece.index] += text
            tokens[piece.index] += piece.tokens
            called[piece.index] += calls
            reasons[piece.index], notes[piece.index] = piece.reason, piece.notes
        choices = []
        for i in range(n):
            message: dict[str, Any] = {"role": "assistant", "content": texts[i]}
            if called[i]:
                message |= {"content": texts[i] or None, "tool_calls": called[i]}
            reason = "tool_calls" if called[i] else reasons[i]
            choice = {"index": i, "message": message, "logprobs": self._logprobs(tokens[i]), "finish_reason": reason}
            choices.append(choice if notes[i] is None else {**choice, "steering": notes[i]})
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.group.usage()}

    def _split(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        if self.calls is None:
            return piece.text, []
        text = self.calls[piece.index].push(piece.text)
        if not piece.reason:
            return text, []
        rest, calls = self.calls[piece.index].finish()
        return text + rest, calls

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [self._token(token) for token in tokens]}

    def _token(self, token: TokenText) -> dict[str, Any]:
        drawn = token.drawn
        top = [self._entry(id, logprob) for id, logprob in drawn.top]
        return {**self._entry(drawn.token, drawn.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = token_bytes(self.service.prompts.tokenizer, token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is practically impossible."""
    return max(-9999.0, logprob if logprob is not None else -9999.0)
