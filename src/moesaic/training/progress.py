"""What a run says while it runs: a progress bar, log.jsonl (one record per line), and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunLog:
    """`log.jsonl` of a run folder. Opening it at `start` drops the lines of steps that are about to be done again."""

    def __init__(self, out: Path, start: int) -> None:
        self.path = out / "log.jsonl"
        self._drop_from(start)
        self._file = self.path.open("a")
        self._board = _board(out, start)

    def _drop_from(self, start: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step(line) < start]
        scratch = self.path.with_suffix(".partial")
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, self.path)

    def write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._file, flush=True)
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, float | int) and key != "step":
                self._board.add_scalar(key, value, step)
            elif isinstance(value, list):
                for layer, number in enumerate(value):
                    self._board.add_scalar(f"{key}/layer_{layer}", number, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


class Silence:
    """The log of a process that is not the first."""

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Display:
    """A live bar on a terminal; on anything else a line now and then, so that a log file stays readable."""

    def __init__(self, console: Console, total: int, start: int, every: int) -> None:
        self.console, self.every = console, every
        self.bar = Progress(
            TextColumn("training"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=total, completed=start, status="")

    def __enter__(self) -> Display:
        self.bar.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)

    def update(self, record: dict[str, Any]) -> None:
        self.bar.update(self.task, advance=1, status=status(record))
        if not self.console.is_terminal and (record["step"] % self.every == 0 or "valid_loss" in record):
            self.console.print(f"step {record['step']}  {status(record)}", highlight=False, soft_wrap=True)


def status(record: dict[str, Any]) -> str:
    text = f"loss {record['loss']:.3f}  {record['tokens_per_second']:,} tokens/s"
    if "max_vio" in record:
        text += "  max/mean load by layer " + " ".join(f"{v + 1:.1f}" for v in record["max_vio"])
        text += f"  cv {_mean(record['load_cv']):.2f}  entropy {_mean(record['load_entropy']):.3f}"
        dead = sum(record["dead_experts"])
        text += f"  {dead} dead" if dead else ""
    return text + (f"  valid {record['valid_loss']:.3f}" if "valid_loss" in record else "")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _step(line: str) -> float:
    """The step of a log line; a line cut off by a kill counts as the last of all."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def _board(out: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoBoard()
    return SummaryWriter(str(out / "tensorboard"), purge_step=start)


class _NoBoard:
    """Stands in when the tensorboard extra is not installed."""

    def add_scalar(self, *args: Any) -> None: ...
    def close(self) -> None: ...
