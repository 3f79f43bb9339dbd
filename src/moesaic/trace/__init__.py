"""Routing traces: record which experts every token chose, once, and let analysis, caching and surgery read the file.

`moesaic.trace(model, path)` records; `open_trace(path)` reads.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.trace.recorder import Recorder

__all__ = ["open_trace", "trace"]


def trace(model: Any, path: str | Path | None = None, **options: Any) -> Recorder:
    """Record the routing of a transformers MoE inside a `with` block, in forward() and generate() alike.

    Args:
        model: the model, or what `moesaic.load` gave (whose tokenizer is then named in the file).
        path: the `.moetrace` to write; None keeps the trace in memory.
        tokenizer: names the vocabulary in the file, so that texts of another one are refused later.
        weights: keep the routing weights (float16). `logits`: keep the raw router scores (float16).
        lookahead: also keep what the routers of the next layers would choose from this layer's input, so many layers on.
        hidden: share of tokens whose router inputs are kept (float16).
        domain: domain of the sequences, or one per row of the batch; `recorder.domain` changes it on the way.
        source, name: what the text is and what the model is called.
        overwrite: replace an existing file. resume: go on in the file of a killed recording.

    Returns a context manager whose `result` is the finished Trace (None where nothing ran). Raises BadInput, or NotMoE.
    """
    from moesaic.trace.recorder import Recorder
    from moesaic.view import Loaded

    if isinstance(model, Loaded):
        options.setdefault("tokenizer", model.tokenizer)
        model = model.model
    return Recorder(model, path, **options)


def __getattr__(name: str) -> Any:
    if name == "open_trace":
        from moesaic.trace.file import open_trace

        return open_trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(types.ModuleType):
    """Importing a submodule makes Python set `moesaic.trace` to this package; calling it must still record."""

    def __call__(self, model: Any, path: str | Path | None = None, **options: Any) -> Recorder:
        return trace(model, path, **options)


sys.modules[__name__].__class__ = _Package
