"""Answers whose course is being worked out: methods that run the model for it give way between passes, and the engine goes on
with the other answers there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesaic.serving.http.jobs import Job, Row
from moesaic.serving.http.steering import Steering
from moesaic.view.course import Course, Steps


@dataclass(eq=False)
class Preparing:
    """Rows of a job that wait for their courses. `then` is called with these once the steps are done."""

    job: Job
    rows: list[Row]
    steps: Steps[list[Course]]
    then: Callable[[list[Course]], None]

    def advance(self) -> bool:
        """One step; False once they are done and `then` was called."""
        try:
            next(self.steps)
        except StopIteration as done:
            self.then(done.value)
            return False
        return True


def first_courses(steering: Steering, job: Job) -> Steps[list[Course]]:
    """A course for each answer to a prompt: one and the same, unless its method draws for itself."""
    first = yield from steering.steps(job.prompt_ids)
    courses = [first]
    while len(courses) < job.n:
        courses.append((yield from steering.steps(job.prompt_ids)) if steering.own else first)
    return courses


def next_course(row: Row) -> Steps[list[Course]]:
    """The course of a row whose course changes now."""
    assert row.course.then is not None
    return [(yield from row.course.then([*row.job.prompt_ids, *row.written]))]
