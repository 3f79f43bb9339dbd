"""moesaic: make a Mixture-of-Experts fit: your machine, your data, your task.

Importing this package imports nothing heavy; each name below loads what it needs on first use. transformers' auto classes
learn our reference models as soon as both are there.
"""

from __future__ import annotations

import importlib
from typing import Any

from moesaic.models import auto

__version__ = "0.1.0"

_LAZY = {
    "view": "moesaic.view",
    "load": "moesaic.view.load",
    "MoE": "moesaic.layers.moe",
    "Routing": "moesaic.core.routing",
    "RoutingContext": "moesaic.core.context",
    "Dispatch": "moesaic.core.routing",
    "register": "moesaic.core.registry",
    "trace": "moesaic.trace",
    "calibrate": "moesaic.trace.calibration",
    "quantize_model": "moesaic.view.quantize",
    "retrofit": "moesaic.surgery.retrofit",
    "open_trace": "moesaic.trace",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


auto.install()
