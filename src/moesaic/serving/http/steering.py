"""`routing` of a request: which experts its tokens may use, and how it is steered. Every row of the batch follows its own
policy, so neighbours are untouched.

The fields of a policy are known here. `routing.steer` names methods, which the server was given as a function: it makes of
{method: options} and a policy something whose `steps(prompt_ids)` give a course (view/course.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.view import Policy, View
from moesaic.view.course import Course, Steps, ready
from moesaic.view.policy import by_layer, resolve

Methods = Callable[[Mapping[str, Any]], Any]
"""`routing` of a request -> what has `bind(model, blocks, tokenizer)`, `steps(prompt_ids)`, `own` and `rewrites`."""


class Steering:
    """One `routing` field, checked against the model. Values hold for all layers, or are {layer or block name: value}."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        blocks: View | None,
        methods: Methods | None = None,
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Raises BadInput for unknown layers, wrong sizes, a k or ids that the model does not have, and methods not offered."""
        if blocks is None:
            raise BadInput("routing: this model is dense, it has no experts to choose from")
        steer = fields.get("steer")
        given = {name: by_layer(value) for name, value in fields.items() if value is not None and name != "steer"}
        self._policy = Policy(**given)
        resolve(self._policy, blocks)
        self._methods: Any = None
        if steer:
            if methods is None:
                raise BadInput("routing: this server was started without steering methods")
            self._methods = methods({**given, "steer": steer}).bind(model, blocks, tokenizer)
            if self._methods.rewrites:
                raise BadInput(f"routing: {self._methods.rewrites}, and a server has sent it: use `moesaic run` or Python")

    @property
    def own(self) -> bool:
        """Whether each of several answers to a prompt needs a course of its own."""
        return self._methods is not None and self._methods.own

    def steps(self, prompt_ids: Sequence[int]) -> Steps[Course]:
        """The course of an answer, giving way between the passes of the model that it may need."""
        return ready(Course(policy=self._policy)) if self._methods is None else self._methods.steps(prompt_ids)


def steer(blocks: View | None, rows: Sequence[Policy | None]) -> AbstractContextManager[Any]:
    """The context for one model call; equal policies are one, so a router runs once for each."""
    if blocks is None or all(row is None for row in rows):
        return nullcontext()
    made: list[Policy] = []
    return blocks.policy(rows=[None if row is None else _known(row, made) for row in rows])


def _known(policy: Policy, made: list[Policy]) -> Policy:
    for other in made:
        if other is policy or _equal(other, policy):
            return other
    made.append(policy)
    return policy


def _equal(first: Policy, second: Policy) -> bool:
    try:
        return bool(first == second)
    except (RuntimeError, ValueError):  # tensors that have more than one truth
        return False
