"""Text and messages to token ids, in one thread beside the event loop: a long prompt must not hold up the others."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.schemas import Message, Tool

T = TypeVar("T")
FALLBACK_STOP = "\nuser:"
"""Where the tokenizer has no chat template, an answer ends where the model begins to write the next question."""


class Prompts:
    """The tokenizer's side of a request. Works on a copy: the engine decodes with the original at the same time."""

    def __init__(self, tokenizer: Any, vocabulary: int, context: int | None) -> None:
        self.tokenizer, self.vocabulary, self.context = copy.deepcopy(tokenizer), vocabulary, context
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.calls_tools_in_tags = self.has_template and "<tool_call>" in str(tokenizer.chat_template)
        self._thread = ThreadPoolExecutor(1, "moesaic-prompts")

    async def run(self, fn: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, fn, *arguments)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def text(self, text: str, param: str) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer itself adds."""
        return self._checked(self._ids(text, param, add_special_tokens=True), param)

    def many(self, given: str | Sequence[Any], param: str) -> list[list[int]]:
        """Ids of every prompt in a field that takes a text, a list of texts, ids, or a list of ids."""
        if isinstance(given, str):
            return [self.text(given, param)]
        if isinstance(given[0], int):
            return [self._checked([int(token) for token in given], param)]
        return [self.text(part, param) if isinstance(part, str) else self._checked(list(part), param) for part in given]

    def chat(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """Ids of a conversation, ready for the assistant's next words.

        The tokenizer's own template, or without one a line `role: text` per message and `assistant:` at the end.
        """
        plain = [_plain(message) for message in messages]
        if not self.has_template:
            if tools:
                raise ApiError(400, "this model has no chat template, so it cannot be given tools", param="tools")
            lines = [f"{message['role']}: {message['content']}" for message in plain]
            return self.text("\n".join([*lines, "assistant:"]), "messages")
        given = None if not tools else [tool.model_dump(exclude_none=True) for tool in tools]
        try:
            text = self.tokenizer.apply_chat_template(plain, tools=given, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates refuse messages with errors of many kinds
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ApiError(400, f"the model's chat template refused the messages: {first}", param="messages") from error
        return self._checked(self._ids(text, "messages", add_special_tokens=False), "messages")

    def _ids(self, text: str, param: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        except (TypeError, ValueError, UnicodeError) as error:
            raise ApiError(400, f"{param} is not text that the tokenizer can read", param=param) from error

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            start = getattr(self.tokenizer, "bos_token_id", None)
            if start is None:
                raise ApiError(400, f"{param} is empty: give some text for the model to continue", param=param)
            ids = [start]
        if max(ids) >= self.vocabulary:
            raise ApiError(400, f"{param}: token {max(ids)} is not one of this model's {self.vocabulary}", param=param)
        if self.context is not None and len(ids) >= self.context:
            raise ApiError(
                400,
                f"{param} is {len(ids):,} tokens, the context here is {self.context:,}, and the answer needs one: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return ids


def _plain(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: content is text, arguments of a call are objects."""
    content = message.content
    text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return plain


def _arguments(call: Any) -> Any:
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments
