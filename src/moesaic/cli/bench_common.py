"""What the commands of `moesaic bench` share: lists by commas, a run with its progress, the shape of a result's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from moesaic.cli.common import console, emit, keep, progress_console


def words(text: str) -> tuple[str, ...]:
    """The parts of a list by commas; a part may hold spaces."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def measured(
    name: str, run: Callable[[Callable[[str], None]], dict[str, Any]], out: Path | None, json: bool
) -> dict[str, Any] | None:
    """The result of `run(progress)`, also kept in `out`; None where it was printed as JSON, and nothing is left to show."""
    with progress_console.status("") as status:
        result = run(lambda text: status.update(f"bench {name}: {text}"))
    keep(result, out)
    if json:
        emit(result)
        return None
    return result


def figures(first: str, *columns: str) -> Table:
    """An empty table: names on the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def show_notes(result: dict[str, Any]) -> None:
    for note in result["notes"]:
        console.print(f"note: {note}")
