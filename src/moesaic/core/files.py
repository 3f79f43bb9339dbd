"""Write a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.core.errors import BadInput


@contextmanager
def replacing(path: str | Path, suffix: str = "") -> Iterator[Path]:
    """A scratch file beside `path`, of a name that ends in `suffix`, which takes its place when the block ends well.

    A full disk, an error or a kill leaves the old file. Raises BadInput naming the file for what the system refuses.
    """
    path = Path(path)
    _check_kind(path)
    scratch = None
    try:
        handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.", suffix=f".partial{suffix}")
        os.close(handle)
        scratch = Path(name)
        yield scratch
        with scratch.open("rb") as stream:
            os.fsync(stream.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path.resolve())
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str) -> Path:
    """Write text beside `path` and rename. Raises BadInput naming the file."""
    with replacing(path) as scratch:
        # Lone surrogates cannot be UTF-8; a report shows them as a question mark instead of failing.
        scratch.write_bytes(text.encode("utf-8", "replace"))
    return Path(path)


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
