"""The page of `moesaic run`: one HTML file with the text coloured by expert and the expert-use map, nothing from outside.

It holds its data as JSON (choices as bytes, in base64) and draws itself; `run_page.html` is the template.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

MOST_TOKENS = 4096
"""Tokens drawn: the last ones of a longer run, so that the page stays light."""


@dataclass
class Layer:
    """One MoE layer: choices [T, K] (-1 = empty slot), their weights, and the numbers of its row in the map."""

    layer: int
    experts: int
    experts_TK: np.ndarray
    weights_TK: np.ndarray
    load: list[int]
    experts_used: int
    max_over_mean: float
    entropy: float

    def data(self, first: int) -> dict[str, Any]:
        ids = self.experts_TK[first:]
        weights = np.nan_to_num(self.weights_TK[first:].astype(np.float32))
        wide = self.experts > 250
        scale = max(float(np.abs(weights).max(initial=0.0)), 1e-6)
        return {
            "layer": self.layer,
            "experts": self.experts,
            "k": ids.shape[1],
            "wide": wide,
            "ids": _base64(ids.astype("<i2") if wide else np.where(ids < 0, 255, ids).astype(np.uint8)),
            "weights": _base64(np.rint(np.clip(weights, 0, None) / scale * 255).astype(np.uint8)),
            "scale": scale,
            "load": self.load,
            "experts_used": self.experts_used,
            "max_over_mean": self.max_over_mean,
            "entropy": self.entropy,
        }


@dataclass
class RunPage:
    """What the page shows. `marks` are labels before a token (its index, the label), such as where the answer starts."""

    title: str
    architecture: str
    intro: str
    facts: list[tuple[str, str, str]]
    tokens: list[str]
    routed: int
    layers: Sequence[Layer]
    made: str
    command: str
    marks: list[tuple[int, str]] = field(default_factory=list)

    def html(self) -> str:
        first = max(0, len(self.tokens) - MOST_TOKENS)
        intro = self.intro + (f" Only the last {MOST_TOKENS:,} of {len(self.tokens):,} tokens are drawn." if first else "")
        data = {
            "title": self.title,
            "architecture": self.architecture,
            "intro": intro,
            "facts": self.facts,
            "tokens": self.tokens[first:],
            "parts": [i for i, text in enumerate(self.tokens[first:]) if not text],
            "routed": max(0, self.routed - first),
            "layers": [layer.data(first) for layer in self.layers],
            "marks": [[max(0, at - first), label] for at, label in self.marks],
            "made": self.made,
            "command": self.command,
        }
        # "<" only ever stands inside strings here; escaped, no text can close the script element.
        encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        template = resources.files("moesaic.report").joinpath("run_page.html").read_text(encoding="utf-8")
        head, rest = template.split("__TITLE__")
        middle, rest = rest.split("__PLAIN__")
        between, tail = rest.split("__DATA__")
        plain = html.escape("".join(self.tokens))
        return head + html.escape(f"moesaic run: {self.title}") + middle + plain + between + encoded + tail


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
