"""The course of one answer: the policy of its calls, the passes beside it, and when it changes.

V vocabulary, C rows beside an answer's own. Steering methods make courses; whoever writes an answer follows one: a loop around
`model.generate`, or a server whose rows share a batch. A method may have to run the model before it knows its course: it
gives way between two passes, so that whoever asked can do other work there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.view.policy import Policy

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that gives way between the model's passes; its result is what the generator returns. No context of it is open while it
waits: torch's modes and policies are those of a thread, not of a generator."""


def finish(steps: Steps[T]) -> T:
    """The result of work, done at once."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value


def ready(result: T) -> Steps[T]:
    """Work that is done."""
    return result
    yield


@dataclass(frozen=True)
class Course:
    """How an answer is written from here on. Everything at its default is the model as it is.

    Args:
        policy: what the answer's own row routes by.
        beside: policies of further rows that read the same tokens with caches of their own.
        mix: mix(own_V, beside_CV) -> the logits to draw from; only with `beside`.
        around: opens what holds during the model's calls and cannot tell rows apart: such an answer shares no call.
        tokens: after so many new tokens `then` gives the next course, and the text so far is read again.
        then: then(ids so far) -> the next course, as steps.
        checks: whether `then` is also asked when the answer ends before that, and may still take its last tokens back.
        back: so many tokens of the text so far are taken back before this course goes on, or refuses to.
        notes: what is worth telling beside the answer.
        refused: why no answer is written at all, or no more of it.
    """

    policy: Policy | None = None
    beside: tuple[Policy, ...] = ()
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    around: Callable[[], AbstractContextManager[Any]] | None = None
    tokens: int | None = None
    then: Callable[[list[int]], Steps[Course]] | None = None
    checks: bool = False
    back: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None

    @property
    def shares(self) -> bool:
        """Whether rows of other answers may be in the same calls."""
        return self.around is None and self.then is None

    def rows(self) -> tuple[Policy | None, ...]:
        """The policies of the answer's own row and of those beside it."""
        return (self.policy, *(p if self.policy is None else self.policy.both(p) for p in self.beside))


def together(courses: Sequence[Course]) -> Course:
    """Several methods on one answer. Raises BadInput for two that each need to lead."""
    whole = Course()
    for course in courses:
        policy = course.policy if whole.policy is None else whole.policy
        if whole.policy is not None and course.policy is not None:
            policy = whole.policy.both(course.policy)
        for name in ("beside", "around", "then"):
            if getattr(whole, name) and getattr(course, name):
                raise BadInput("steer: two of these methods each decide how the answer is written; take one of them")
        whole = replace(
            whole, policy=policy, beside=whole.beside or course.beside, mix=whole.mix or course.mix,
            around=whole.around or course.around, notes={**whole.notes, **course.notes},
            refused=whole.refused or course.refused, back=max(whole.back, course.back),
        )  # fmt: skip
    leads = [course for course in courses if course.then is not None]
    if leads:
        (lead,), others = leads, [course for course in courses if course.then is None]
        lead_on = lead.then
        assert lead_on is not None

        def then(ids: list[int]) -> Steps[Course]:
            return together([(yield from lead_on(ids)), *others])

        whole = replace(whole, tokens=lead.tokens, then=then, checks=lead.checks)
    return whole
