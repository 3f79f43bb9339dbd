"""What the endpoints share: which names are served, how long a request may take, and how its fields become jobs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.core.errors import MoesaicError
from moesaic.serving.http.bridge import Group
from moesaic.serving.http.engine import Engine
from moesaic.serving.http.errors import ApiError
from moesaic.serving.http.jobs import Job
from moesaic.serving.http.prompts import Prompts
from moesaic.serving.http.sampling import Options
from moesaic.serving.http.schemas import Common, Routing
from moesaic.serving.http.steering import Methods, Steering

ENDLESS = 2048
"""Tokens of an answer whose request names none, on a model whose context has no known end."""


@dataclass
class Service:
    """One server: the engine and what it is called.

    Args:
        names: model names that requests may use; the first is the model's own.
        timeout: seconds that any request may take, waiting included.
        write_timeout: seconds that a client may leave written text untaken.
        facts: what the live page says about the model.
        streaming: what `/stats` says of experts that are read from disk, asked for each time; None where none are.
        methods: what `routing.steer` is made into; None where requests may name no methods.
    """

    engine: Engine
    names: Sequence[str]
    timeout: float = 600.0
    write_timeout: float = 60.0
    facts: dict[str, Any] = field(default_factory=dict)
    streaming: Callable[[], dict[str, Any]] | None = None
    methods: Methods | None = None

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.prompts = Prompts(self.engine.tokenizer, self.engine.vocabulary, self.engine.context)

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for any name but those served: a name is compared, and is never looked up anywhere."""
        if name not in self.names:
            raise ApiError(
                404, f"no model {name!r} here: this server has {', '.join(self.names)}", param="model", code="model_not_found"
            )

    def seconds(self, asked: float | None) -> float:
        return self.timeout if asked is None else min(asked, self.timeout)

    def steering(self, routing: Routing | None) -> Steering | None:
        """Raises ApiError for a routing that this model cannot follow."""
        fields = {} if routing is None else routing.model_dump(exclude_none=True)
        if not fields:
            return None
        try:
            return Steering(fields, self.engine.blocks, self.methods, self.engine.model, self.engine.tokenizer)
        except (MoesaicError, ValueError, TypeError) as error:
            raise ApiError(400, f"routing: {str(error).removeprefix('routing: ')}", param="routing") from error

    def begin(
        self,
        body: Common,
        prompts: Sequence[list[int]],
        endpoint: str,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        stop: tuple[str, ...] = (),
    ) -> Group:
        """Queue one job per prompt. Raises ApiError when a field is beyond this server, or the queue is full."""
        engine, n = self.engine, body.n or 1
        if n > engine.max_rows:
            raise ApiError(400, f"n is {n}, this server writes at most {engine.max_rows} answers at a time", param="n")
        if len(prompts) > engine.max_waiting + engine.max_rows:
            raise ApiError(400, f"{len(prompts)} prompts: this server takes at most {engine.max_waiting}", param="prompt")
        for token in body.logit_bias or {}:
            if int(token) >= engine.vocabulary:
                raise ApiError(400, f"logit_bias: no token {token} in a vocabulary of {engine.vocabulary}", param="logit_bias")
        steering = self.steering(body.routing)
        group = Group(engine)
        jobs = []
        for number, ids in enumerate(prompts):
            room = None if engine.context is None else engine.context - len(ids)
            options = Options(
                max_tokens=max_tokens or room or ENDLESS,
                temperature=_or(body.temperature, 1.0),
                top_p=_or(body.top_p, 1.0),
                top_k=max(0, body.top_k or 0),
                frequency_penalty=body.frequency_penalty or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
                logit_bias=tuple((int(token), value) for token, value in (body.logit_bias or {}).items()),
                seed=body.seed,
                stop=(*body.stops(), *stop),
                logprobs=logprobs,
                ignore_eos=bool(body.ignore_eos),
            )
            jobs.append(Job(ids, options, group.deliver(number), n, steering, self.seconds(body.timeout), room, endpoint))
        group.submit(jobs)
        return group


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
