"""Ctrl-C and termination, heard between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM comes: the step in progress ends first. A second signal acts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for one in before:
            signal.signal(one, before[one])

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in before:
        signal.signal(one, note)
    try:
        yield came
    finally:
        for one in before:
            signal.signal(one, before[one])
