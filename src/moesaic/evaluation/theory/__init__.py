"""Claims about routing that a computer can check: each experiment samples, fits or iterates, and says what it saw.

An experiment is a function of (seed, repetitions, quick) that returns {"claims": [...], "plots": [...], numbers}. A claim is
{"claim", "shows": yes | no | unclear, "saw"}; a plot is {"title", "x", "y", "log", "lines": {name: [[x, y], ...]}}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesaic.evaluation.theory.activation_gate import activation_gate
from moesaic.evaluation.theory.alf_lb import alf_lb
from moesaic.evaluation.theory.over_specified import over_specified

EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "activation_gate": activation_gate,
    "alf_lb": alf_lb,
    "over_specified": over_specified,
}

__all__ = ["EXPERIMENTS"]
