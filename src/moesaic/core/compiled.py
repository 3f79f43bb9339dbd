"""Compile a loop with Numba where it is installed (the `cpu` extra); elsewhere the same code runs as plain Python.

For loops over events that NumPy cannot express: the plain function is its own naive twin, reached as `fn.py_func`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

AVAILABLE = find_spec("numba") is not None


def compiled(function: F) -> F:
    """`numba.njit(cache=True)` at the first call, so that importing a module costs no compiler."""
    if not AVAILABLE:
        function.py_func = function  # type: ignore[attr-defined]
        return function

    @functools.cache
    def build() -> Any:
        import numba

        return numba.njit(cache=True, nogil=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return build()(*arguments)

    call.py_func = function  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
