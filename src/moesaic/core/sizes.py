"""Bytes as people write them: `4GiB`, `600 MB`, `1.5e9`."""

from __future__ import annotations

import math
import re
import resource
import sys

from moesaic.core.errors import BadInput

UNITS = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
"""Unit in lower case -> bytes; a bare letter is binary, as in memory sizes."""


def parse_bytes(text: str, what: str = "size") -> int:
    """Whole bytes of `4GiB`, `600MB` or a plain number. Raises BadInput that names `what` and the text."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found.group(2).lower() not in UNITS:
        raise BadInput(f"{what} {text!r} is no size: write 4GiB, 600MB or a number of bytes")
    value = float(found.group(1)) * UNITS[found.group(2).lower()]
    if not math.isfinite(value) or value >= 2**62:
        raise BadInput(f"{what} {text!r} is too large")
    return round(value)


def parse_rate(text: str, what: str = "rate") -> float:
    """Bytes per second of `25GB/s`, `25GB` or a plain number; more than 0."""
    value = parse_bytes(re.sub(r"/s(ec)?$", "", text.strip()), what)
    if value <= 0:
        raise BadInput(f"{what} {text!r}: must be more than 0 bytes per second")
    return float(value)


def show_bytes(size: float) -> str:
    """A size in its binary unit, three digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}" if size < 1000 else f"{size:,.0f} {unit}"
        size /= 1024
    raise AssertionError


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes, Python and libraries included."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # getrusage would count the process that started us
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
