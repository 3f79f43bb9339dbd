"""How many bits each expert's weights get: one number, a file of them, or a mean that the most used experts rise above."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.store.packed import QUANTISED

WHOLE = 16
"""Stands for experts as they are, in 32 bits where the checkpoint is fp32."""

LADDER = (*QUANTISED[::-1], WHOLE)


class Bits:
    """`of(block, ...)` gives the bits of each expert of a block.

    Args:
        given: a number: 16 (as stored), 8, 4 or 2; or a mapping of "default", a block's name or `{name}.{e}` to such.
        usage_LE: counts of use [L, E], -1 where a layer has no such expert. Then `given` is a mean between 2 and 16: all
            experts begin with the most bits that all can have, and the most used of the whole model rise to the next width as
            far as the mean allows.
    """

    def __init__(self, given: Any = WHOLE, usage_LE: np.ndarray | None = None) -> None:
        self._usage = usage_LE
        self._unused: set[str] = set()
        self._blocks = 0
        if usage_LE is not None:
            if isinstance(given, Mapping) or not (math.isfinite(given) and LADDER[0] <= given <= WHOLE):
                raise BadInput(f"--bits {given} with --importance: give the mean number of bits, {LADDER[0]} to {WHOLE}")
            self._chosen = by_usage(usage_LE, float(given))
            return
        self._given = given if isinstance(given, Mapping) else {"default": given}
        for name, bits in self._given.items():
            if bits not in LADDER:
                raise BadInput(f"--bits: {bits!r} for {name}: give {WHOLE} (as stored), 8, 4 or 2")
        self._unused = set(self._given) - {"default"}

    def of(self, name: str, number: int, experts: int, whole: int) -> tuple[int, ...]:
        """Bits [E] of block `number`; experts that stay as they are have `whole`. Raises BadInput where usage does not fit."""
        if self._usage is not None:
            known = int((self._usage[number] >= 0).sum()) if number < len(self._usage) else 0
            if experts != known:
                raise BadInput(
                    f"--importance: the trace has {known} experts in block {number}, the model has {experts} in {name}"
                )
            self._blocks = number + 1
            chosen = self._chosen[number, :experts].tolist()
        else:
            default = self._find(name, self._given.get("default", WHOLE))
            chosen = [self._find(f"{name}.{e}", default) for e in range(experts)]
        return tuple(whole if bits == WHOLE else int(bits) for bits in chosen)

    def check_used(self) -> None:
        """Raises BadInput for a name in the file that is no block and no expert of the model, or blocks it does not have."""
        if self._usage is not None and self._blocks != len(self._usage):
            raise BadInput(f"--importance: the trace has {len(self._usage)} layers, the model has {self._blocks}")
        if self._unused:
            raise BadInput(f"--bits: the model has no experts {sorted(self._unused)[0]} ({len(self._unused)} such names)")

    def _find(self, name: str, default: int) -> int:
        self._unused.discard(name)
        return self._given.get(name, default)


def by_usage(usage_LE: np.ndarray, mean: float) -> np.ndarray:
    """Bits [L, E]: the widest of 2, 4, 8 and 16 for all, and the next for the most used, as far as the mean allows."""
    low = max(bits for bits in LADDER if bits <= mean)
    chosen = np.full(usage_LE.shape, low, np.int64)
    if low == WHOLE:
        return chosen
    high = LADDER[LADDER.index(low) + 1]
    count = math.floor((mean - low) / (high - low) * (usage_LE >= 0).sum() + 1e-9)
    order = np.argsort(-usage_LE, axis=None, kind="stable")
    chosen.reshape(-1)[order[:count]] = high
    return chosen


def parse_bits(text: str, usage_LE: np.ndarray | None = None) -> Bits:
    """`--bits`: a number, or a JSON file of {"default": 4, "model.layers.0.mlp.experts": 8, ...}. Raises BadInput."""
    try:
        return Bits(float(text) if usage_LE is not None else int(text), usage_LE)
    except ValueError:
        pass
    path = Path(text)
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--bits {text}: give 16, 8, 4, 2 or a JSON file ({error.strerror})") from error
    except ValueError as error:
        raise BadInput(f"--bits {text} is not JSON ({error})") from error
    if not isinstance(given, dict):
        raise BadInput(f'--bits {text}: expected an object such as {{"default": 4, "model.layers.0.mlp.experts": 8}}')
    return Bits(given, usage_LE)
