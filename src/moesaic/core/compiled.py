"""Compile a loop with Numba where it is installed (the `cpu` extra); elsewhere the same code runs as plain Python.

For loops over events that NumPy cannot express. The plain function is its own naive twin, reached as `fn.py_func`.
Importing this module imports Numba (half a second): import it where a command needs it, not on the way to `--help`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

AVAILABLE = find_spec("numba") is not None

if AVAILABLE:
    import numba

    def compiled(function: F) -> F:
        """Compile at the first call, or from the cache on disk."""
        return numba.njit(cache=True, nogil=True)(function)

else:

    def compiled(function: F) -> F:
        """The function itself: slow, and right."""
        function.py_func = function  # type: ignore[attr-defined]
        return function
