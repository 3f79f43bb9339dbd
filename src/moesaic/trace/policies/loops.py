"""How the loops of replay and policies are compiled: `compiled`, or `inlined` into their callers.

A call that passes a whole `State` costs as much as the work of an event, so short functions become part of the loop. Numba
keeps what it compiled until the function's own file changes, though it holds code of other files too: here a change in any
of their files makes it compile anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from moesaic.core.compiled import AVAILABLE
from moesaic.core.compiled import compiled as alone

F = TypeVar("F", bound=Callable[..., Any])
HERE = Path(__file__).parent


@cache
def _stamp() -> tuple[float, int]:
    beside = [HERE.parent / name for name in ("simulate.py", "order.py", "hardware.py")]
    files = [path.stat() for path in [*HERE.glob("*.py"), *beside]]
    return max(file.st_mtime for file in files), sum(file.st_size for file in files)


def _dated(dispatcher: Any) -> Any:
    with suppress(AttributeError):  # a Numba that keeps its cache elsewhere: clear __pycache__ after a change
        _ = dispatcher._cache._cache_file._source_stamp
        dispatcher._cache._cache_file._source_stamp = _stamp()
    return dispatcher


def compiled(function: F) -> F:
    """Compile at the first call, or from the cache on disk; plain Python without Numba."""
    return _dated(alone(function))


if AVAILABLE:
    import numba

    def inlined(function: F) -> F:
        """As `compiled`, and always part of whoever calls it."""
        return _dated(numba.njit(cache=True, nogil=True, forceinline=True)(function))

else:
    inlined = compiled
