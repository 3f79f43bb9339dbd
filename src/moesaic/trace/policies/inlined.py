"""Compile a short function into its callers: a call that passes a whole `State` costs as much as the work of an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moesaic.core.compiled import AVAILABLE, compiled

F = TypeVar("F", bound=Callable[..., Any])

if AVAILABLE:
    import numba

    def inlined(function: F) -> F:
        """As `compiled`, and always part of whoever calls it."""
        return numba.njit(cache=True, nogil=True, forceinline=True)(function)

else:
    inlined = compiled
