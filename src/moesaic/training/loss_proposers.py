"""Plugging a proposer into the search of losses: a Python callable by name, or a command that answers JSON lines."""

from __future__ import annotations

import importlib
import json
import selectors
import shlex
import subprocess
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.training.loss_search import Proposer


def named(name: str) -> Proposer:
    """`package.module:function`, imported. Raises BadInput naming what is missing."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"proposer {name!r}: {error}; write package.module:function") from error
    if not callable(found):
        raise BadInput(f"proposer {name!r} is not callable")
    return found


class Command:
    """A process that reads {"parent", "archive", "tried"} per line and answers {"expression"} per line.

    It is started at the first question and asked again afterwards. Raises BadInput when it ends, takes more than `seconds`,
    or says something else.
    """

    def __init__(self, command: str, seconds: float = 120.0) -> None:
        self.command, self.seconds = command, seconds
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, parent: str, context: dict[str, Any]) -> str:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"parent": parent, **context}) + "\n")
            process.stdin.flush()
        except OSError as error:
            self.close()
            raise BadInput(f"proposer {self.command!r} ended") from error
        with selectors.DefaultSelector() as wait:
            wait.register(process.stdout, selectors.EVENT_READ)
            if not wait.select(self.seconds):
                self.close()
                raise BadInput(f"proposer {self.command!r} said nothing for {self.seconds:g} s")
        line = process.stdout.readline()
        try:
            return str(json.loads(line)["expression"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if not line:
                self.close()
            raise BadInput(f'proposer {self.command!r}: {line.strip()[:80]!r} is no {{"expression": ...}}') from error

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    shlex.split(self.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                )
            except (OSError, ValueError, IndexError) as error:
                raise BadInput(f"proposer {self.command!r} does not start ({error})") from error
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None
