"""What a token is when it stands alone: its bytes, which need not be whole characters."""

from __future__ import annotations

import functools
import re
from typing import Any

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for the 256 bytes: printable ones stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token adds to a text."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text.encode("utf-8", "replace")
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if found := _BYTE.match(piece):
        return bytes([int(found[1], 16)])
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in piece):
        return bytes(alphabet[char] for char in piece)
    return text.encode("utf-8", "replace")
