"""Running a plan's cells: one process each, several at a time, within a time budget; finished ones are not run again."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.laboratory.plan import Cell, Plan

POLL = 0.2
"""Seconds between two looks at the running cells."""
GRACE = 60.0
"""Seconds that a stopped cell has to save its state."""
PRELOAD = ["torch", "transformers", "moesaic.laboratory.cell"]
"""Imported once, in the process that all cells are forked from."""


@dataclass
class State:
    """Where a cell stands: waiting, running, done, failed, or stopped (saved, to be resumed)."""

    cell: Cell
    status: str = "waiting"
    result: dict[str, Any] | None = None
    process: Any = None
    fresh: bool = False
    """Run now, not found finished."""

    @property
    def error(self) -> str:
        return (self.result or {}).get("error", "")


@dataclass
class Sweep:
    """The cells of a plan and what became of them; `look` is called whenever something moved."""

    plan: Plan
    jobs: int = 1
    budget: float | None = None
    """Seconds; at the end of them running cells save and stop."""
    retry: bool = False
    """Run cells again that failed before."""
    look: Callable[[Sweep], None] = lambda sweep: None
    states: list[State] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return self.plan.out / "cells"

    @property
    def left(self) -> float | None:
        """Seconds of the budget that are left."""
        return None if self.budget is None else self.budget - (time.monotonic() - self._began)

    def add(self, cells: Iterable[Cell]) -> list[State]:
        """Take in cells; those already in, or finished on disk, are not run again."""
        known = {state.cell.key: state for state in self.states}
        added = []
        for cell in cells:
            state = known.get(cell.key)
            if state is None:
                state = State(cell)
                result = read_result(self.folder, cell)
                if result is not None and not (self.retry and result["status"] == "failed"):
                    state.status, state.result = result["status"], result
                self.states.append(state)
            added.append(state)
        return added

    def run(self, goal: dict[str, Any] | None = None) -> bool:
        """Run what waits; False when the budget ended or a signal came first. `goal`: see `run_cell`."""
        from moesaic.laboratory.cell import prepare_tokens

        todo = [state for state in self.states if state.status in ("waiting", "stopped")]
        for cell in {state.cell.tokens_key: state.cell for state in todo}.values():
            prepare_tokens(cell, self.folder)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        running: list[State] = []
        before = _on_termination(_interrupt)
        try:
            while (todo or running) and not self._over():
                while todo and len(running) < self.jobs:
                    state = todo.pop(0)
                    running.append(self._start(state, context, goal))
                self._reap(running)
                self.look(self)
                if running:
                    running[0].process.join(POLL)
        finally:
            _on_termination(signal.SIG_IGN)
            self._stop(running)
            self.look(self)
            _on_termination(before)
        return not todo and not any(state.status == "stopped" for state in self.states)

    def _over(self) -> bool:
        return self.left is not None and self.left <= 0

    def _start(self, state: State, context: Any, goal: dict[str, Any] | None) -> State:
        state.process = context.Process(target=_body, args=(state.cell, self.folder, goal), name=state.cell.key)
        state.process.start()
        state.status, state.fresh, state.result = "running", True, None
        return state

    def _reap(self, running: list[State]) -> None:
        for state in [state for state in running if not state.process.is_alive()]:
            running.remove(state)
            self._ended(state)

    def _ended(self, state: State) -> None:
        from moesaic.laboratory.cell import STOPPED

        code = state.process.exitcode
        if code == STOPPED:
            state.status = "stopped"
            return
        result = read_result(self.folder, state.cell) if code == 0 else None
        if result is None:
            why = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            result = {**state.cell.facts, "status": "failed", "error": f"the cell's process ended without a result ({why})"}
        state.status, state.result = result["status"], result

    def _stop(self, running: list[State]) -> None:
        """Ask what still runs to save its state, and wait for it."""
        for state in running:
            state.process.terminate()
        deadline = time.monotonic() + GRACE
        for state in running:
            state.process.join(max(0.0, deadline - time.monotonic()))
            if state.process.is_alive():
                state.process.kill()
                state.process.join()
            self._ended(state)
            if state.status == "failed" and state.process.exitcode != 0:
                state.status, state.result = "stopped", None
        running.clear()


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _on_termination(handler: Any) -> Any:
    """Set what SIGTERM does, where that can be set; returns what it did."""
    if threading.current_thread() is not threading.main_thread():
        return signal.SIG_DFL
    return signal.signal(signal.SIGTERM, handler)


def _body(cell: Cell, folder: Path, goal: dict[str, Any] | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to all; the parent passes on one SIGTERM
    from transformers.utils import logging

    from moesaic.laboratory.cell import run_cell

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    run_cell(cell, folder, goal)


def read_result(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The finished result of exactly this cell; one of another recipe, or cut short, is none."""
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError, TypeError):
        result = json.loads((folder / f"{cell.key}.json").read_text())
        if result["fingerprint"] == cell.fingerprint and result["status"] in ("done", "failed"):
            return result
    return None


def progress(folder: Path, cell: Cell) -> dict[str, Any]:
    """The last record of a running cell's log; empty before the first."""
    log = folder / f"{cell.key}-{cell.fingerprint}" / "log.jsonl"
    with contextlib.suppress(OSError, json.JSONDecodeError, IndexError):
        return json.loads(log.read_text().splitlines()[-1])
    return {}
