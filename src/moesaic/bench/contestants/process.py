"""The parent's side: start a contestant, under a memory limit where asked for, and talk to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.bench.memory_limit import MemoryLimit
from moesaic.core.errors import BadInput

HERE = Path(__file__).resolve().parent


class Contestant:
    """A model in its own process. Raises BadInput with the child's own words where it fails."""

    def __init__(self, name: str, command: Sequence[str], limit: MemoryLimit | None = None) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed in close()
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        self._process = subprocess.Popen(
            limit.prefixed(command) if limit else command,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env={**os.environ, **quiet},
        )  # fmt: skip
        self.loaded = self._answer()

    def ask(self, do: str, ids: Sequence[int] = ()) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, "ids": list(ids)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip() or "no message").splitlines()[-1]
            raise BadInput(f"{self.name} ended with code {self._process.returncode}: {last}")
        reply = json.loads(line)
        if "error" in reply:
            raise BadInput(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def model_command(folder: Path, threads: int, kind: str, **how: Any) -> list[str]:
    """moesaic, streamed, transformers or accelerate: see models.KINDS."""
    return [
        sys.executable, "-m", "moesaic.bench.contestants.models", str(folder), str(threads), json.dumps({"kind": kind, **how}),
    ]  # fmt: skip


def llama_command(python: str, file: Path, threads: int) -> list[str]:
    return [python, str(HERE / "llama_cpp.py"), str(file), str(threads)]


def has_llama_cpp(python: str) -> str | None:
    """Why this interpreter cannot run llama.cpp; None where it can."""
    try:
        tried = subprocess.run([python, "-c", "import llama_cpp, gguf"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"llama.cpp: {python}: {error}"
    if tried.returncode:
        return f"llama.cpp: {python} has no llama_cpp and gguf (pip install llama-cpp-python gguf; name it with --llama-python)"
    return None


def write_gguf(python: str, folder: Path, kind: str) -> Path:
    """The checkpoint as GGUF beside its folder, written once."""
    file = folder.parent / f"{folder.name}-{kind}.gguf"
    if not file.is_file():
        made = subprocess.run(
            [python, str(HERE.parent / "gguf_file.py"), str(folder), str(file), kind], capture_output=True, text=True
        )
        if made.returncode:
            raise BadInput(f"writing {file} failed: {(made.stderr.strip() or 'no message').splitlines()[-1]}")
    return file
