"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from moesaic.serving.http.answers import Completion, ErrorBody
from moesaic.serving.http.bridge import Group, unless_gone
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.jobs import TokenText
from moesaic.serving.http.schemas import CompletionRequest
from moesaic.serving.http.service import Service, new_id
from moesaic.serving.http.sse import EventStream
from moesaic.serving.http.token_text import token_bytes

router = APIRouter()
DEFAULT_TOKENS = 16
"""OpenAI's own default for this endpoint."""


@router.post("/v1/completions", response_model=None, responses={200: {"model": Completion}, "4XX": {"model": ErrorBody}})
async def completions(request: Request, body: CompletionRequest) -> Response:
    """A text that goes on, whole or as a stream of server-sent events."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported: the prompt's log-probabilities are not kept", param="echo")
    prompts = await service.prompts.run(service.prompts.many, body.prompt, "prompt")
    group = service.begin(body, prompts, "completions", max_tokens=body.max_tokens or DEFAULT_TOKENS, logprobs=body.logprobs)
    echoed = [_decoded(service, ids) for ids in prompts] if body.echo else [""] * len(prompts)
    answer = _Answer(service, body, group, echoed)
    if body.stream:
        return EventStream(answer.chunks(), group.cancel, service.write_timeout)
    try:
        return JSONResponse(await unless_gone(request.receive, asyncio.create_task(answer.whole())))
    finally:
        group.cancel()


class _Answer:
    """Choice index = prompt's number * n + answer's number, as OpenAI orders them."""

    def __init__(self, service: Service, body: CompletionRequest, group: Group, echoed: list[str]) -> None:
        self.service, self.body, self.group, self.echoed = service, body, group, echoed
        self.n = body.n or 1
        self.head = {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": body.model}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        more: dict[str, Any] = {"usage": None} if usage else {}
        for prompt, text in enumerate(self.echoed):
            for i in range(self.n if text else 0):
                yield {**self.head, "choices": [self._choice(prompt * self.n + i, text, (), None)]} | more
        async for prompt, piece in self.group.pieces():
            index = prompt * self.n + piece.index
            choice = self._choice(index, piece.text, piece.tokens, piece.reason, piece.notes)
            yield {**self.head, "choices": [choice]} | more
        if usage:
            yield {**self.head, "choices": [], "usage": self.group.usage()}

    async def whole(self) -> dict[str, Any]:
        count = len(self.echoed) * self.n
        texts = [self.echoed[i // self.n] for i in range(count)]
        tokens: list[list[TokenText]] = [[] for _ in range(count)]
        reasons: list[str | None] = [None] * count
        notes: list[dict[str, Any] | None] = [None] * count
        async for prompt, piece in self.group.pieces():
            index = prompt * self.n + piece.index
            texts[index] += piece.text
            tokens[index] += piece.tokens
            reasons[index], notes[index] = piece.reason, piece.notes
        choices = [self._choice(i, texts[i], tokens[i], reasons[i], notes[i]) for i in range(count)]
        return {**self.head, "choices": choices, "usage": self.group.usage()}

    def _choice(
        self, index: int, text: str, tokens: Iterable[TokenText], reason: str | None, notes: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}
        return choice if notes is None else {**choice, "steering": notes}

    def _logprobs(self, tokens: Iterable[TokenText]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            drawn = token.drawn
            found["tokens"].append(self._name(drawn.token))
            found["token_logprobs"].append(_finite(drawn.logprob))
            found["top_logprobs"].append({self._name(id): _finite(logprob) for id, logprob in drawn.top})
            found["text_offset"].append(token.start)
        return found

    def _name(self, token: int) -> str:
        raw = token_bytes(self.service.prompts.tokenizer, token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:  # part of a character: two different ones must not share a name
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _decoded(service: Service, ids: list[int]) -> str:
    return service.prompts.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _finite(logprob: float | None) -> float:
    return max(-9999.0, logprob if logprob is not None else -9999.0)
