"""The contract of steering: a method is built from options, bound to a model, and gives each answer its course.

Steering methods change no weight. What most of them ask for is a routing policy (view/policy.py), which rows of a batch follow
each for itself; a course (view/course.py) says what else there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from moesaic.core.errors import BadInput
from moesaic.view import Policy, View
from moesaic.view.course import Course, Steps, finish, ready, together
from moesaic.view.policy import resolve


class Steer:
    """One method with its options. `bind` comes once per model, `steps` (or `start`, which is its result) once per answer;
    a method has one of the two."""

    files: ClassVar[frozenset[str]] = frozenset()
    """Options that name a file."""
    alone: ClassVar[str | None] = None
    """Why answers under this method share no call with others; None where they do."""
    rewrites: ClassVar[str | None] = None
    """Why a server, which sends tokens as they come, cannot follow this method; None where it can."""
    own = False
    """Whether several answers to one prompt need a course each: one that remembers what it has drawn."""

    model: Any = None
    blocks: View | None = None

    def bind(self, model: Any, blocks: View | None, tokenizer: Any = None) -> None:
        """Check the options against a model. Raises BadInput naming what it does not have."""
        self.model, self.blocks = model, blocks
        self.check()

    def check(self) -> None:
        """Raises BadInput for options that `self.model` and `self.blocks` do not allow."""

    def start(self, prompt_ids: Sequence[int]) -> Course:
        """The course of an answer to this prompt; may run the model."""
        return finish(self.steps(prompt_ids))

    def steps(self, prompt_ids: Sequence[int]) -> Steps[Course]:
        """`start`, giving way between the model's passes."""
        return ready(self.start(prompt_ids))

    def experts(self) -> View:
        """The blocks. Raises BadInput for a model without experts."""
        if self.blocks is None:
            raise BadInput(f"{type(self).__name__.lower()}: this model is dense, it has no experts to steer")
        return self.blocks


class ByPolicy(Steer):
    """A method that is one policy, the same for every answer."""

    def policy(self) -> Policy:
        raise NotImplementedError

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return Course(policy=self.policy())


class Steering:
    """All that one request asks for: a policy of plain fields and any number of methods."""

    def __init__(self, methods: Sequence[Steer] = (), policy: Policy | None = None) -> None:
        self.methods, self.policy = list(methods), policy
        self.blocks: View | None = None

    def bind(self, model: Any, blocks: View | None, tokenizer: Any = None) -> Steering:
        if self.policy is not None and blocks is None:
            raise BadInput("routing: this model is dense, it has no experts to choose from")
        if self.policy is not None and blocks is not None:
            try:
                resolve(self.policy, blocks)
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadInput(f"routing: a value of the wrong kind ({error})") from error
        self.blocks = blocks
        for method in self.methods:
            method.bind(model, blocks, tokenizer)
        return self

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return finish(self.steps(prompt_ids))

    def steps(self, prompt_ids: Sequence[int]) -> Steps[Course]:
        courses = [] if self.policy is None else [Course(policy=self.policy)]
        for method in self.methods:
            courses.append((yield from method.steps(prompt_ids)))
        return together(courses)

    @property
    def own(self) -> bool:
        return any(method.own for method in self.methods)

    @property
    def alone(self) -> str | None:
        return next((method.alone for method in self.methods if method.alone), None)

    @property
    def rewrites(self) -> str | None:
        return next((method.rewrites for method in self.methods if method.rewrites), None)
