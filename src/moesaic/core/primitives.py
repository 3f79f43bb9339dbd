"""How many compiled matrix products oneDNN and torch keep: one for every number of rows they meet, 0.3 MB each and more.

Routing gives every expert another number of tokens in every pass, so a pass over a text compiles thousands that no later
one uses; by default 1,024 stay, twice.
"""

from __future__ import annotations

import os

KEPT = 32


def keep_few() -> None:
    """Must be called before a process multiplies its first matrices; afterwards, and where the user has set them, no effect.

    `os.environ` does not show it, so that processes started with it keep what they are used to.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        if name not in os.environ:
            os.putenv(name, str(KEPT))
