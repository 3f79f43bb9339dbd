"""What the server counts: requests, tokens, waiting times, and how often each expert was chosen.

Written by the engine's thread and the HTTP side, read by `/metrics` and `/stats`. No text is kept. E experts.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor

from moesaic.serving.http.jobs import Job
from moesaic.view import View

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
HALF_LIFE = 20.0
"""Seconds after which a choice of an expert counts half in the live picture."""
HISTORY = 120
RECENT = 12


class Histogram:
    """Counts per bucket, as Prometheus wants them."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        total, rows = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class ExpertLoad:
    """How often each expert of each layer was chosen: since the start, and lately."""

    def __init__(self, blocks: View) -> None:
        self.layers = [(block.layer, block.num_experts) for block in blocks]
        self._total = [torch.zeros(n, dtype=torch.float64) for _, n in self.layers]
        self._recent = [torch.zeros(n, dtype=torch.float64) for _, n in self.layers]
        self._faded = time.monotonic()
        self._handles = [block.on_choice(self._watch(i)) for i, block in enumerate(blocks)]

    def _watch(self, index: int) -> Any:
        experts = self.layers[index][1]

        def watch(choice: Any, block: Any) -> None:
            ids = choice.ids.reshape(-1)
            counts_E = torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts).to("cpu", torch.float64)
            self._total[index] += counts_E
            self._recent[index] += counts_E

        return watch

    def fade(self) -> None:
        """Called between steps: what is older weighs less."""
        now = time.monotonic()
        if now - self._faded > 0.5:
            factor = 0.5 ** ((now - self._faded) / HALF_LIFE)
            for counts_E in self._recent:
                counts_E *= factor
            self._faded = now

    def read(self) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "experts": n, "total": total.long().tolist(), "recent": [round(v, 2) for v in recent.tolist()]}
            for (layer, n), total, recent in zip(self.layers, self._total, self._recent, strict=True)
        ]

    def imbalance(self) -> list[tuple[int, float]]:
        """Per layer: the busiest expert's choices over the mean, since the start."""

        def of(total_E: Tensor) -> float:
            mean = total_E.mean().item()
            return total_E.max().item() / mean if mean else 0.0

        return [(layer, of(total_E)) for (layer, _), total_E in zip(self.layers, self._total, strict=True)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Meter:
    """All counts of one server."""

    def __init__(self, load: ExpertLoad | None = None) -> None:
        self.load = load
        self.began = time.time()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.completion_tokens = self.embedding_tokens = 0
        self.steps = self.stepped_rows = 0
        self.first_token, self.between_tokens = Histogram(), Histogram()
        self.request_seconds, self.queue_seconds = Histogram(), Histogram()
        self.job_seconds = 1.0
        """What a job takes once it runs, lately: for Retry-After."""
        self._seconds: deque[tuple[int, int]] = deque(maxlen=HISTORY)
        self._recent: deque[Job] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def answered(self, endpoint: str, status: int) -> None:
        self.answers[endpoint, status] += 1

    def read_prompt(self, job: Job) -> None:
        job.started = time.monotonic() if job.started is None else job.started
        self.prompt_tokens += len(job.prompt_ids)
        self.queue_seconds.add(job.started - job.submitted)

    def drew(self, job: Job, tokens: int) -> None:
        """A step gave this job tokens, one for each of its rows."""
        now = time.monotonic()
        if job.first_token is None:
            job.first_token = now
            self.first_token.add(now - job.submitted)
        elif job.last_token is not None:
            self.between_tokens.add(now - job.last_token, tokens)
        job.last_token = now
        job.completion_tokens += tokens
        self.completion_tokens += tokens
        with self._lock:
            second = int(now)
            if self._seconds and self._seconds[-1][0] == second:
                self._seconds[-1] = (second, self._seconds[-1][1] + tokens)
            else:
                self._seconds.append((second, tokens))

    def stepped(self, rows: int) -> None:
        self.steps += 1
        self.stepped_rows += rows

    def embedded(self, texts: int, tokens: int) -> None:
        self.outcomes["embedded"] += texts
        self.embedding_tokens += tokens

    def ended(self, job: Job, outcome: str) -> None:
        job.outcome, job.ended = outcome, time.monotonic()
        self.outcomes[outcome] += 1
        self.request_seconds.add(job.ended - job.submitted)
        if job.started is not None:
            self.job_seconds += 0.2 * (job.ended - job.started - self.job_seconds)
        with self._lock:
            self._recent.append(job)

    def per_second(self, seconds: int = HISTORY) -> list[int]:
        """Tokens written in each of the last full seconds, oldest first."""
        now = int(time.monotonic())
        with self._lock:
            known = dict(self._seconds)
        return [known.get(second, 0) for second in range(now - seconds, now)]

    def recent(self) -> list[dict[str, Any]]:
        """The last finished jobs, newest first: sizes and times, no text."""
        with self._lock:
            return [job_row(job) for job in reversed(self._recent)]


def job_row(job: Job) -> dict[str, Any]:
    """A job in the live table."""
    now = job.ended or time.monotonic()
    wrote = None if job.first_token is None else (job.last_token or now) - job.first_token
    return {
        "number": job.number,
        "endpoint": job.endpoint,
        "prompt_tokens": len(job.prompt_ids),
        "completion_tokens": job.completion_tokens,
        "answers": job.n,
        "steered": job.steering is not None,
        "state": job.outcome,
        "seconds": round(now - job.submitted, 3),
        "first_token_seconds": None if job.first_token is None else round(job.first_token - job.submitted, 3),
        "tokens_per_second": round((job.completion_tokens - job.n) / wrote, 1) if wrote else None,
    }
