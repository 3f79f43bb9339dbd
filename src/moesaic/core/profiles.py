"""Machine profiles that `moesaic bench machine` keeps in the user's cache folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moesaic.core.errors import BadInput


def folder() -> Path:
    """Where they are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moesaic"


def newest() -> Path | None:
    """The profile written last, None where none is kept."""
    found = [path for path in folder().glob("*threads.json") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def read(path: Path) -> dict[str, Any]:
    """A stored profile. Raises BadInput naming the file for anything else."""
    try:
        profile = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"cannot read machine profile {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInput(f"{path} is no machine profile: it is not JSON") from error
    if not isinstance(profile, dict) or "read_bytes_per_second" not in profile:
        raise BadInput(f"{path} is no machine profile: make one with `moesaic bench machine`")
    return profile
