"""File compressors on the same text, as bits per byte: the yardstick that no tokenizer can cheat."""

from __future__ import annotations

import lzma


def xz(data: bytes) -> float:
    """Bits per byte of `xz -9`."""
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


def zstd(data: bytes) -> float | None:
    """Bits per byte of `zstd -19`; None when the zstandard package is not installed."""
    try:
        import zstandard
    except ImportError:
        return None
    return 8 * len(zstandard.ZstdCompressor(level=19).compress(data)) / len(data)


def compare(texts: list[str]) -> dict[str, float | None]:
    """Both compressors on the concatenation of `texts`, which is their best case: they see it all as one file."""
    data = "".join(texts).encode()
    if not data:
        return {"xz": None, "zstd": None}
    return {"xz": xz(data), "zstd": zstd(data)}
