"""Text out of tokens as they come: never half a character, never a lost byte."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers.generation.streamers import BaseStreamer

REPLACEMENT = "\ufffd"
"""What a decoder writes for an unfinished character; text that ends with it waits for the next token."""


class TextPieces:
    """Turns ids into text one token at a time. The pieces, joined, are the tokenizer's decoding of all ids.

    Decoding restarts at the last piece, not at the last token: some tokenizers drop the space of a first word.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        self._prefix = 0
        self._read = 0

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self.ids.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is held back, finished or not."""
        return self._advance(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self.ids[self._prefix :])[len(self._decode(self.ids[self._prefix : self._read])) :]

    def _advance(self, text: str) -> str:
        # A special token decodes to nothing: advancing past it keeps the prefix short.
        self._prefix, self._read = self._read, len(self.ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False) if ids else ""


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token in place; a token that only starts a character has none, the one that ends it has all."""
    pieces = TextPieces(tokenizer, skip_special_tokens=False)
    texts = [pieces.push(token) for token in ids]
    rest = pieces.flush()
    if texts and rest:
        texts[-1] += rest
    return texts


class Streamer(BaseStreamer):
    """What `model.generate` calls: keeps ids and times, and hands each finished piece of text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        self.pieces = TextPieces(tokenizer)
        self.on_text = on_text
        self.times: list[float] = []
        self._prompt_seen = False
        self._began = time.perf_counter()

    @property
    def ids(self) -> list[int]:
        return self.pieces.ids

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.reshape(-1).tolist():
            self.times.append(time.perf_counter() - self._began)
            text = self.pieces.push(token)
            if text:
                self.on_text(text)

    def end(self) -> None:
        text = self.pieces.flush()
        if text:
            self.on_text(text)
