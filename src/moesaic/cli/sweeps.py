"""What `moesaic sweep` and `moesaic lab` share: options, the live table, the result files, the page."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from moesaic.bench.machine import describe
from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.laboratory.run import State, Sweep, progress
from moesaic.laboratory.summary import rows

Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Cells that run at the same time, each in its own process.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Stop after this long (90s, 50m, 2h); the next call goes on.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run cells again that failed before.")]

COLOURS = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "red", "stopped": "yellow"}
REFRESH = 1.0
LINES = 24
"""Rows of the live table: running and failed cells first, then the newest."""


def seconds(text: str | None) -> float | None:
    """90, 90s, 50m or 2h in seconds. Raises BadInput."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not found or float(found[1]) <= 0:
        raise BadInput(f"--budget {text}: a time such as 90s, 50m or 2h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def table_of(sweep: Sweep) -> Table:
    """Where every cell stands."""
    counts = {name: sum(state.status == name for state in sweep.states) for name in COLOURS}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    left = "" if sweep.left is None else f"; {max(0, sweep.left) / 60:.0f} min of the budget left"
    table = Table(title=f"{told}{left}", title_justify="left")
    for name, justify in (("cell", "left"), ("", "left"), ("step", "right"), ("loss", "right"), ("valid", "right"),
                          ("bits/byte", "right"), ("MaxVio", "right"), ("tokens/s", "right")):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for state in shown(sweep.states):
        table.add_row(*cells_of(sweep, state))
    return table


def shown(states: Sequence[State]) -> list[State]:
    """As many as fit: what runs or failed, the cells done last, those that come next."""
    urgent = [s for s in states if s.status in ("running", "failed", "stopped")]
    done = [s for s in states if s.status == "done"]
    waiting = [s for s in states if s.status == "waiting"]
    room = max(0, LINES - len(urgent))
    picked = [*done[-(room - room // 3) :], *waiting[: room // 3]] if room else []
    chosen = {id(state) for state in [*urgent[:LINES], *picked]}
    return [state for state in states if id(state) in chosen]


def cells_of(sweep: Sweep, state: State) -> list[str]:
    status = f"[{COLOURS[state.status]}]{state.status}[/]"
    steps = state.cell.recipe["steps"]
    if state.status == "failed":
        return [state.cell.key, status, "", state.error[:60]]
    if state.status == "done":
        found = (state.result or {})["results"]
        vio = _number(found.get("max_vio"), 2)
        speed = f"{found['tokens_per_cpu_second']:,}" if found.get("tokens_per_cpu_second") else ""
        numbers = [_number(found.get(name), 3) for name in ("train_loss", "valid_loss", "bits_per_byte")]
        return [state.cell.key, status, str(steps), *numbers, vio, speed]
    record = progress(sweep.folder, state.cell) if state.status in ("running", "stopped") else {}
    if not record:
        return [state.cell.key, status, f"0/{steps}"]
    violations = record.get("max_vio")
    mean = sum(violations) / len(violations) if violations else None
    numbers = [_number(record["loss"], 3), _number(record.get("valid_loss"), 3), "", _number(mean, 2)]
    return [state.cell.key, status, f"{record['step'] + 1}/{steps}", *numbers, f"{record['tokens_per_second']:,}"]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def watch(console: Console, sweep: Sweep, run: Callable[[], bool]) -> bool:
    """Run with a live table on a terminal, else with a line whenever a cell ends. True when nothing is left to do."""
    last = time.monotonic() - REFRESH
    told: set[str] = set()
    live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def look(sweep: Sweep) -> None:
        nonlocal last
        for state in sweep.states:
            if state.fresh and state.status in ("done", "failed", "stopped") and state.cell.key not in told:
                told.add(state.cell.key)
                if live is None:
                    console.print(" ".join(part for part in cells_of(sweep, state) if part), highlight=False, soft_wrap=True)
        if live is not None and time.monotonic() - last >= REFRESH:
            last = time.monotonic()
            live.update(table_of(sweep), refresh=True)

    sweep.look = look
    with live or nullcontext():
        ended = run()
    console.print(table_of(sweep))
    return ended


def results_of(sweep: Sweep) -> list[dict[str, Any]]:
    """The results there are, in the order of the cells."""
    return [state.result for state in sweep.states if state.result is not None]


def write_summary(sweep: Sweep, path: Path) -> dict[str, Any]:
    """One JSON file of the sweep: a row per method and every cell; rounded, so that it stays small."""
    results = results_of(sweep)
    missing = [state.cell.key for state in sweep.states if state.result is None]
    told = {
        "machine": describe(),
        "plan": sweep.plan.path.name,
        "base": sweep.plan.base,
        "left_out": sweep.plan.left_out,
        "missing": missing,
        "rows": rows(results),
        "cells": [{key: value for key, value in result.items() if key != "traceback"} for result in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(rounded(told), separators=(",", ":")).replace('{"cell":', '\n{"cell":') + "\n")
    return told


def rounded(value: Any) -> Any:
    """The same with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value
