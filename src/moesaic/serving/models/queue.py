"""Which waiting request is next: one switch per model instead of one per request, and nobody waits for ever.

First come first served is a window of 1. With a wider one, requests in the window are served group by group: models that
are in memory first, then the largest group, then the oldest; a request that waited too long goes before them all. In one
window the switches are then exactly the models that were not there when it began, the least that any order can do. Windows
that follow one another may end on different models than first come first served would, so over a stream the gain is a
matter of measuring (`simulate`), not of proof.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moesaic.core.errors import BadInput
from moesaic.serving.models.residency import Residency

R = TypeVar("R")


@dataclass(frozen=True)
class Waiting:
    """Requests for one model: how many, and when the oldest came (any clock)."""

    model: str
    count: int
    oldest: float


def next_group(groups: Iterable[Waiting], resident: Collection[str], now: float, max_wait: float) -> str:
    """The model to serve next. Raises ValueError where nobody waits."""

    def order(group: Waiting) -> tuple[Any, ...]:
        late = now - group.oldest > max_wait
        return (not late, group.oldest if late else 0, group.model not in resident, -group.count, group.oldest)

    return min(groups, key=order).model


def group(
    models: Sequence[str],
    resident: Callable[[], Collection[str]],
    *,
    window: int = 64,
    max_wait: float = float("inf"),
) -> Iterable[int]:
    """Indices into `models` (the model of each request, in order of arrival) in the order to serve them.

    The window holds the first so many requests that are not served yet; it is filled up after every group. `resident` is
    asked before each choice; `max_wait` counts requests served meanwhile. Raises BadInput.
    """
    if window < 1 or not max_wait >= 0:
        raise BadInput(f"a queue window of {window} and a wait of {max_wait} requests: give at least 1, and 0 or more")
    seen: dict[str, list[tuple[int, int]]] = {}  # model -> (request, requests served when it came)
    served = taken = 0
    while served < len(models):
        while taken < len(models) and taken - served < window:
            seen.setdefault(models[taken], []).append((taken, served))
            taken += 1
        groups = [Waiting(name, len(found), found[0][1]) for name, found in seen.items()]
        # A tie of ages goes to the earlier request: dictionaries keep the order in which models came in.
        chosen = next_group(groups, resident(), served, max_wait)
        for request, _ in seen.pop(chosen):
            yield request
            served += 1


def serve_grouped(
    models: Sequence[str], residency: Residency, run: Callable[[str, list[int]], Sequence[R]], *, window: int = 64
) -> list[R]:
    """Results of all requests in their own order, with as few switches as the window allows.

    `run(model, requests)` brings the model in and answers these requests of it; it is called once per group.
    """
    found: dict[int, R] = {}
    batch: list[int] = []

    def flush() -> None:
        if batch:
            answers = run(models[batch[0]], batch)
            if len(answers) != len(batch):
                raise BadInput(f"{models[batch[0]]} gave {len(answers)} answers to {len(batch)} requests")
            found.update(zip(batch, answers, strict=True))
            batch.clear()

    def resident() -> list[str]:
        flush()  # what the last group brought in counts for the next choice
        return residency.resident()

    for request in group(models, resident, window=window):
        batch.append(request)
    flush()
    return [found[i] for i in range(len(models))]
