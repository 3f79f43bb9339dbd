"""The engine: requests in, batched steps, tokens out. One thread runs the model; everything else only talks to it.

A step reads the prompts that wait (alone and unpadded, at most `prefill_tokens` per step, so running answers go on),
then feeds every running row its last token in one call. Rows leave when they are complete, cancelled or late; the next
step has their places. In float32, greedy text is token by token that of `model.generate` on the request alone; in narrower
dtypes a product over several rows may round a near tie differently, as in every batched engine, and `alone=True` (rows
share the schedule but not the call) is bitwise `generate` in any dtype.

transformers' own continuous batching (`model.init_continuous_batching`, 5.23) was tried first. It runs on a CPU and
takes temperature, top-k and top-p per request, but draws all of them from one global generator (no seed per request) and
decides greedy or not once for all; it has no penalties, no stop strings, and log-probabilities of the drawn token only;
it packs rows into one sequence without saying which token is whose, so a routing policy per request cannot reach them;
and it refuses layers other than full or sliding attention. On a GPU with flash attention its paged cache would be faster.
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from moesaic.core.errors import BadInput, MoesaicError, NotMoE
from moesaic.serving.generate import context_length, end_tokens
from moesaic.serving.http.batch import Batch, Runner
from moesaic.serving.http.errors import ApiError, closing, timed_out
from moesaic.serving.http.jobs import Beside, Done, Failed, Job, Row, drawn_from
from moesaic.serving.http.meter import ExpertLoad, Meter
from moesaic.serving.http.preparing import Preparing, first_courses, next_course
from moesaic.store import ReadFailed
from moesaic.view import View, view
from moesaic.view.course import Course

log = logging.getLogger("moesaic.serve")

AGAIN_SECONDS = 5.0
"""A step that failed is done again row by row for so long."""


class Engine:
    """Runs one loaded model for many requests.

    Args:
        model: any causal language model of transformers, wherever its weights are.
        max_rows: answers written at the same time.
        max_waiting: jobs that may wait beyond those; more are refused with 429.
        max_context: tokens of prompt and answer together; the model's own limit where that is smaller.
        prefill_tokens: prompt tokens read between two steps (one prompt at least).
        alone: every row has its own call.
        threads: torch's CPU threads for the model; None leaves them as they are.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_rows: int = 16,
        max_waiting: int = 64,
        max_context: int | None = None,
        prefill_tokens: int = 512,
        alone: bool = False,
        threads: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.prefill_tokens, self.alone, self.threads = prefill_tokens, alone, threads
        known = [n for n in (context_length(model.config), max_context) if n is not None]
        self.context = min(known) if known else None
        self.vocabulary = model.get_input_embeddings().num_embeddings
        try:
            self.blocks: View | None = view(model)
        except NotMoE:
            self.blocks = None
        for block in self.blocks or ():
            _ = block.top_k  # may run the router once: here, not beside a step
        self.meter = Meter(None if self.blocks is None else ExpertLoad(self.blocks))
        self._runner = Runner(model, self.blocks)
        self._ends = frozenset(end_tokens(model, tokenizer))
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._batches: list[Batch] = []
        self._preparing: deque[Preparing] = deque()
        self._wake = threading.Condition()
        self._close_by: float | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        # A context of its own: a policy in force where the server was started is not the requests'.
        self._thread = threading.Thread(
            target=contextvars.Context().run, args=(self._loop,), name="moesaic-engine", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def closing(self) -> bool:
        return self._close_by is not None

    @property
    def running(self) -> int:
        return sum(len(rows) for rows in self._rows())

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._calls)

    def jobs(self) -> list[Job]:
        """Jobs that run or wait."""
        with self._wake:
            running = {row.job.number: row.job for rows in self._rows() for row in rows}
            return [*running.values(), *self._waiting]

    def _rows(self) -> list[Sequence[Row | Beside]]:
        """Those of each batch, and of each job that works out its course."""
        groups: list[Batch | Preparing] = [*list(self._batches), *list(self._preparing)]
        return [tuple(group.rows) for group in groups]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. Raises ApiError: 429 when the queue is full, 503 when the engine is closing."""
        with self._wake:
            self._check_room(len(jobs))
            for job in jobs:
                job.unfinished = job.n
            self._waiting.extend(jobs)
            self._wake.notify()

    def call(self, fn: Callable[[], Any]) -> Future:
        """Run fn() in the engine's thread between two steps; it waits and is refused like a job."""
        future: Future = Future()
        with self._wake:
            self._check_room(1)
            self._calls.append((fn, future))
            self._wake.notify()
        return future

    def _check_room(self, wanted: int) -> None:
        if self.closing or not self.alive:
            raise closing()
        free = self.max_rows - self.running
        if self.waiting + wanted > self.max_waiting + max(0, free):
            self.meter.outcomes["refused"] += 1
            seconds = self.meter.job_seconds * (self.waiting + 1) / self.max_rows
            raise ApiError(
                429,
                f"{self.waiting} requests are waiting already: try again later",
                code="queue_full",
                retry_after=max(1, min(60, math.ceil(seconds))),
            )

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs; their rows are free at the next step."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def close(self, grace: float = 0.0) -> None:
        """Take nothing new; what runs and waits has `grace` seconds to finish, the rest fails with 503. Returns at once."""
        with self._wake:
            by = time.monotonic() + grace
            self._close_by = by if self._close_by is None else min(by, self._close_by)
            self._wake.notify()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end after `close`."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _loop(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        with torch.inference_mode():
            while self._sleep():
                try:
                    self._drop()
                    self._serve_calls()
                    self._admit()
                    self._prepare()
                    self._step()
                except Exception:  # a fault of ours must not silence the other requests' server
                    log.exception("the engine failed between requests; every running request is given up")
                    self._fail_rows(self._rows(), ApiError(500, "the engine failed; see the server's log"))
                    self._batches.clear()
                    self._preparing.clear()
        if self.meter.load is not None:
            self.meter.load.close()

    def _sleep(self) -> bool:
        """Wait for work; False when the engine is to end."""
        with self._wake:
            while not (self._waiting or self._batches or self._calls or self._preparing):
                if self.closing:
                    return False
                self._wake.wait(5.0)
            return True

    def _drop(self) -> None:
        """Cancelled and late jobs leave, and all jobs when the time to close is up."""
        now = time.monotonic()
        final = self._close_by is not None and now >= self._close_by
        with self._wake:
            for job in [job for job in self._waiting if job.cancelled or now >= job.deadline or final]:
                self._waiting.remove(job)
                self._give_up(job, final)
            calls = list(self._calls) if final else []
            for call in calls:
                self._calls.remove(call)
        for _, future in calls:
            future.set_exception(closing())
        for rows in self._rows():
            for row in rows:
                if not row.job.over and (row.job.cancelled or now >= row.job.deadline or final):
                    self._give_up(row.job, final)
        self._sweep()
        if self.meter.load is not None:
            self.meter.load.fade()

    def _give_up(self, job: Job, final: bool) -> None:
        if job.cancelled:
            self.meter.ended(job, "cancelled")
            job.deliver(Failed(ApiError(499, "the client has gone", code="cancelled")))
        elif time.monotonic() >= job.deadline:
            self._fail(job, timed_out(job.timeout), "timed out")
        else:
            assert final
            self._fail(job, closing(), "closed")

    def _fail(self, job: Job, error: ApiError, outcome: str = "failed") -> None:
        if not job.over:
            self.meter.ended(job, outcome)
            job.deliver(Failed(error))

    def _serve_calls(self) -> None:
        with self._wake:
            call = self._calls.popleft() if self._calls else None
        if call is not None and call[1].set_running_or_notify_cancel():
            try:
                call[1].set_result(call[0]())
            except Exception as error:
                call[1].set_exception(error)

    def _admit(self) -> None:
        """Read waiting prompts, first come first served, while there are rows and this step's tokens last."""
        budget = self.prefill_tokens
        while True:
            with self._wake:
                if not self._waiting or self.running + self._waiting[0].n > self.max_rows:
                    return
                if len(self._waiting[0].prompt_ids) > budget < self.prefill_tokens:
                    return
                job = self._waiting.popleft()
            budget -= len(job.prompt_ids)
            with self._failing(job):
                self.meter.read_prompt(job)
                job.outcome = "running"
                rows = [Row(job, index, self.tokenizer, self._ends) for index in range(job.n)]
                if job.steering is None:
                    self._read(job, rows)
                else:
                    self._advance(Preparing(job, rows, first_courses(job.steering, job), partial(self._begin, job, rows)))
            if budget <= 0:
                return

    @contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """What goes wrong inside takes this job down, no other."""
        try:
            yield
        except ReadFailed as error:
            self._fail(job, _unread(error))
        except ApiError as error:
            self._fail(job, error)
        except MoesaicError as error:  # a routing that only the router itself could refuse
            self._fail(job, ApiError(400, str(error), param="routing"))
        except Exception:
            log.exception("reading %d tokens failed", len(job.prompt_ids) + job.completion_tokens)
            self._fail(job, ApiError(500, "the model failed on this text; see the server's log"))

    def _prepare(self) -> None:
        """One pass for one of the answers that work out their course, each in its turn."""
        if self._preparing:
            waits = self._preparing.popleft()
            with self._failing(waits.job):
                self._advance(waits)

    def _advance(self, waits: Preparing) -> None:
        if waits.advance():
            self._preparing.append(waits)

    def _begin(self, job: Job, rows: list[Row], courses: list[Course]) -> None:
        for row, course in zip(rows, courses, strict=True):
            row.begin(course)
        if courses[0].refused is None:
            self._read(job, rows)
            return
        for row in rows:
            row.withhold()
        self._finish(rows)

    def _read(self, job: Job, rows: list[Row]) -> None:
        if not rows[0].course.shares:
            for row in rows:
                self._read_apart(row)
            self.meter.drew(job, job.n)
            self._finish(rows)
            return
        batch, logits_V = Batch.read(self._runner, rows[0], job.n)
        others = [Batch.read(self._runner, Beside(rows[0], c), job.n) for c in range(len(rows[0].course.beside))]
        if others and not batch.joins:
            raise BadInput("this model's cache cannot hold a second pass beside an answer")
        mix = rows[0].course.mix
        if mix is not None:
            logits_V = mix(logits_V, torch.stack([logits for _, logits in others]))
        going = [row for row in rows if not self._take(row, logits_V)]
        self.meter.drew(job, job.n)
        self._finish(rows)
        if not going or job.over:
            return
        apart = self.alone or not batch.joins
        if apart and not others:
            self._batches += batch.split(going)
            return
        batch = batch.spread(going)
        for c, (other, _) in enumerate(others):
            batch.join(other.spread([Beside(row, c) for row in going]))
        shared = next((b for b in self._batches if b.joins and b.shares), None)
        if shared is None or apart:
            batch.shares = not apart
            self._batches.append(batch)
        else:
            shared.join(batch)

    def _read_apart(self, row: Row) -> None:
        """Read, or read again, the text of an answer that shares no call; draw, and give it a batch of its own."""
        batch, logits_V = Batch.read(self._runner, row, 1)
        batch.shares = False
        if not self._take(row, logits_V) and not row.job.over:
            self._batches.append(batch)

    def _step(self) -> None:
        for batch in list(self._batches):
            if any(row.owner.due for row in batch.rows):
                self._turn(batch)
                continue
            try:
                logits_BV = batch.step()
            except ReadFailed as error:
                self._step_apart(batch, error)
                continue
            except Exception:
                log.exception("a step over %d rows failed", len(batch.rows))
                self._fail_rows([batch.rows], ApiError(500, "the model failed while answering; see the server's log"))
                continue
            self._draw(batch, logits_BV)
        self._sweep()

    def _turn(self, batch: Batch) -> None:
        """An answer whose course changes now: its text is read again under the next one."""
        self._batches.remove(batch)
        row = batch.rows[0].owner

        def then(courses: list[Course]) -> None:
            row.turn(courses[0])
            self._read_apart(row)
            self.meter.drew(row.job, 1)
            self._finish([row])

        with self._failing(row.job):
            self._advance(Preparing(row.job, [row], next_course(row), then))

    def _draw(self, batch: Batch, logits_BV: torch.Tensor) -> None:
        """Give the rows of a step their tokens; complete ones leave."""
        self.meter.stepped(len(batch.rows))
        answers = drawn_from(batch.rows, logits_BV)
        counts: dict[int, int] = {}
        for row, _ in answers:
            counts[row.job.number] = counts.get(row.job.number, 0) + 1
        for job in {row.job.number: row.job for row, _ in answers}.values():
            self.meter.drew(job, counts[job.number])
        complete = {id(row) for row, logits_V in answers if self._take(row, logits_V)}
        batch.keep([id(row.owner) not in complete for row in batch.rows])
        self._finish([row for row, _ in answers])

    def _step_apart(self, batch: Batch, error: ReadFailed) -> None:
        """Experts that some row of a batch needs did not come: do the step again row by row, so that only rows that need
        them fail. Rows that are not reached within AGAIN_SECONDS, as where reads hang, fail with them."""
        log.warning("a step over %d rows is done again row by row: %s", len(batch.rows), error)
        self._batches.remove(batch)
        if not batch.undo():
            self._fail_rows([batch.rows], _unread(error))
            return
        whole: Batch | None = None
        until = time.monotonic() + AGAIN_SECONDS
        for one in batch.apart():
            if one.rows[0].job.over:  # another answer of the same job has failed
                continue
            if time.monotonic() > until:
                self._fail_rows([one.rows], _unread(error))
                continue
            try:
                logits_BV = one.step()
            except ReadFailed as again:
                self._fail_rows([one.rows], _unread(again))
                continue
            except Exception:
                log.exception("a step of one row failed")
                self._fail_rows([one.rows], ApiError(500, "the model failed while answering; see the server's log"))
                continue
            self._draw(one, logits_BV)
            if one.rows and whole is not None:
                whole.join(one)
            elif one.rows:
                self._batches.append(one)
                whole = one

    def _take(self, row: Row, logits_V: torch.Tensor) -> bool:
        """Give a row its token; True when it needs no more. A row that fails takes its own job down, no other."""
        if row.job.over:
            return True
        try:
            complete = row.take(logits_V)
        except Exception:
            log.exception("drawing a token failed")
            self._fail(row.job, ApiError(500, "drawing a token failed; see the server's log"))
            return True
        if complete:
            row.job.unfinished -= 1
        return complete

    def _finish(self, rows: list[Row]) -> None:
        for job in {row.job.number: row.job for row in rows}.values():
            if job.unfinished == 0 and not job.over:
                self.meter.ended(job, "done")
                job.deliver(Done(len(job.prompt_ids), job.completion_tokens))

    def _fail_rows(self, groups: Sequence[Sequence[Row | Beside]], error: ApiError) -> None:
        for rows in groups:
            for row in rows:
                self._fail(row.job, error)

    def _sweep(self) -> None:
        """Rows of jobs that are over leave, and batches without rows."""
        for batch in self._batches:
            batch.keep([not row.job.over for row in batch.rows])
        self._batches = [batch for batch in self._batches if batch.rows]
        self._preparing = deque(waits for waits in self._preparing if not waits.job.over)


def _unread(error: ReadFailed) -> ApiError:
    """Streamed experts that did not come: the next request may find the file whole again."""
    log.error("experts could not be read: %s", error)
    return ApiError(500, f"the model's weights could not be read: {error}", code="weights_unreadable")
