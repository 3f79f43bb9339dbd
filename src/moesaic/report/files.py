"""Write a report whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from moesaic.core.errors import BadInput


def write_atomically(path: str | Path, text: str) -> Path:
    """Write beside `path` and rename: a full disk or a kill leaves the old file. Raises BadInput naming the file."""
    path = Path(path)
    _check_kind(path)
    scratch = None
    try:
        # Lone surrogates cannot be UTF-8; a report shows them as a question mark instead of failing.
        data = text.encode("utf-8", "replace")
        handle, scratch = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.", suffix=".partial")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path.resolve())
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    return path


def check_writable(path: str | Path) -> None:
    """Raises BadInput when the folder of `path` is missing, or nothing may be written there: known before any work."""
    path = Path(path)
    _check_kind(path)
    if not path.parent.is_dir():
        raise BadInput(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise BadInput(f"cannot write {path}: no permission to write in {path.parent.resolve()}")


def _check_kind(path: Path) -> None:
    """A rename would put a file in the place of a device."""
    if path.is_dir():
        raise BadInput(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise BadInput(f"cannot write {path}: it is not a regular file")
