"""A job is one prompt with n answers; a row is one of those answers while it is being written."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.sampling import Drawn, Options, Sampler
from moesaic.serving.http.steering import Steering
from moesaic.serving.http.stops import StopText
from moesaic.serving.stream import TextPieces
from moesaic.view import Policy
from moesaic.view.course import Course

Reason = Literal["stop", "length", "content_filter"]
"""The last is OpenAI's word for an answer that was withheld: here, a method of steering abstained."""
_numbers = itertools.count(1)


@dataclass(frozen=True)
class TokenText:
    """A drawn token for a client that asked for log-probabilities; `start` is where its text begins in the answer."""

    drawn: Drawn
    start: int


@dataclass(frozen=True)
class Piece:
    """More text of answer `index`; the last piece has a reason, and where routing was asked for what there is to say of it."""

    index: int
    text: str
    tokens: tuple[TokenText, ...] = ()
    reason: Reason | None = None
    notes: dict[str, Any] | None = None


@dataclass(frozen=True)
class Done:
    """Every answer of the job is complete."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The job ended without its answers."""

    error: ApiError


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """What the engine runs. `deliver` is called from the engine's thread and must not block.

    Args:
        deadline: time.monotonic() after which the job fails.
        room: tokens that the context leaves for an answer; None when the context has no known end.
    """

    prompt_ids: list[int]
    options: Options
    deliver: Callable[[Event], None]
    n: int = 1
    steering: Steering | None = None
    timeout: float = 600.0
    room: int | None = None
    endpoint: str = ""
    number: int = field(default_factory=lambda: next(_numbers))
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    completion_tokens: int = 0
    unfinished: int = 0
    cancelled: bool = False
    outcome: str = "waiting"

    @property
    def deadline(self) -> float:
        return self.submitted + self.timeout

    @property
    def over(self) -> bool:
        return self.ended is not None


class Row:
    """One answer in the making: its sampler, its text so far, and how many of its tokens the cache holds."""

    def __init__(self, job: Job, index: int, tokenizer: Any, ends: frozenset[int]) -> None:
        self.job, self.index, self.length = job, index, len(job.prompt_ids)
        self.last = -1
        self.course = Course()
        self.notes: dict[str, Any] = {}
        self.written: list[int] = []
        self.changed_at = 0
        self._ends = frozenset() if job.options.ignore_eos else ends
        self._sampler = Sampler(job.options, index)
        self._pieces = TextPieces(tokenizer)
        self._stops = StopText(job.options.stop)
        self._left = min(job.options.max_tokens, job.options.max_tokens if job.room is None else job.room)
        self._seen = self._sent = 0
        self._tokens: list[TokenText] = []

    @property
    def policy(self) -> Policy | None:
        return self.course.policy

    @property
    def owner(self) -> Row:
        return self

    @property
    def due(self) -> bool:
        """Whether the answer's course changes before its next token."""
        tokens = self.course.tokens
        return self.course.then is not None and tokens is not None and len(self.written) - self.changed_at >= tokens

    def begin(self, course: Course) -> None:
        """Follow a course from here on; its notes stand beside earlier ones."""
        self.course = course
        self.notes |= course.notes

    def turn(self, course: Course) -> None:
        """Take the next course; the text so far is then to be read again."""
        self.begin(course)
        self.changed_at = len(self.written)
        self.length = len(self.job.prompt_ids) + len(self.written)

    def withhold(self) -> None:
        """End the answer before its first token: its course refused it."""
        self.notes["abstained"] = self.course.refused
        self._send("", "content_filter")
        self.job.unfinished -= 1

    def take(self, logits_V: Tensor) -> bool:
        """Draw a token, hand on the text that became certain; True when the answer is complete."""
        drawn = self._sampler.draw(logits_V)
        self.last = drawn.token
        self.written.append(drawn.token)
        self._left -= 1
        ended = drawn.token in self._ends
        if not ended:
            if self.job.options.logprobs is not None:
                self._tokens.append(TokenText(drawn, self._seen))
            text = self._pieces.push(drawn.token)
            self._seen += len(text)
            certain = self._stops.push(text)
        else:
            certain = ""
        reason: Reason | None = None
        if ended or self._left <= 0:
            certain += self._rest()
            reason = "stop" if ended else "length"
        if self._stops.stopped:
            reason = "stop"
        if certain or reason:
            self._send(certain, reason)
        return reason is not None

    def _rest(self) -> str:
        """What the decoder and the stop strings held back, at the end of the answer."""
        if self._stops.stopped:
            return ""
        text = self._pieces.flush()
        self._seen += len(text)
        certain = self._stops.push(text)
        return certain if self._stops.stopped else certain + self._stops.flush()

    def _send(self, text: str, reason: Reason | None) -> None:
        self._sent += len(text)
        # A token belongs to the piece that holds the first of its characters; what a stop string took has none.
        ready = [token for token in self._tokens if token.start < self._sent or (reason and not self._stops.stopped)]
        self._tokens = self._tokens[len(ready) :]
        notes = None if reason is None or self.job.steering is None else {"exact": False, **self.notes}
        self.job.deliver(Piece(self.index, text, tuple(ready), reason, notes))


class Beside:
    """A row that reads an answer's tokens under another policy, with a cache of its own; it draws none."""

    def __init__(self, owner: Row, number: int) -> None:
        self.owner, self.number, self.length = owner, number, owner.length

    @property
    def job(self) -> Job:
        return self.owner.job

    @property
    def course(self) -> Course:
        return self.owner.course

    @property
    def written(self) -> list[int]:
        return self.owner.written

    @property
    def last(self) -> int:
        return self.owner.last

    @property
    def policy(self) -> Policy | None:
        return self.owner.course.rows()[1 + self.number]


def drawn_from(rows: Sequence[Row | Beside], logits_BV: Tensor) -> list[tuple[Row, Tensor]]:
    """The answers of a batch, each with the logits that it draws from: its own, mixed with those of the rows beside it."""
    beside: dict[int, list[Tensor]] = {}
    for row, logits_V in zip(rows, logits_BV, strict=True):
        if isinstance(row, Beside):
            beside.setdefault(id(row.owner), []).append(logits_V)
    found = []
    for row, logits_V in zip(rows, logits_BV, strict=True):
        if isinstance(row, Row):
            mix = row.course.mix
            found.append((row, logits_V if mix is None else mix(logits_V, torch.stack(beside[id(row)]))))
    return found
