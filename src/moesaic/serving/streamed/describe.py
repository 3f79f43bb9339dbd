"""What a streamed run says of itself: bytes held and read, hits, waiting, and the most memory the process took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.core.sizes import peak_bytes
from moesaic.serving.streamed.device_stats import device_facts

if TYPE_CHECKING:
    from moesaic.serving.streamed import Streamed
    from moesaic.serving.streamed.engine import Engine


def streaming_facts(streamed: Streamed) -> dict[str, Any]:
    """Keys of `moesaic run --json`, in bytes and seconds. `resident_bytes`: other weights and the experts held now."""
    engine = streamed.engine
    tensors = {id(t): t for t in [*streamed.model.parameters(), *streamed.model.buffers()]}.values()
    other = sum(t.nbytes for t in tensors if not t.is_meta)
    return {
        **live_facts(engine),
        "prefetch_budget_bytes": engine.prefetch.budget_bytes if engine.prefetch.active else 0,
        "page_cache": engine.reader.page_cache,
        "memory_bytes": engine.plan.budget_bytes,
        "capacity_bytes": engine.plan.capacity_bytes,
        "expert_total_bytes": engine.shape.total_bytes,
        "resident_bytes": other + engine.held_bytes,
        "peak_bytes": peak_bytes(),
        **({} if streamed.tier is None else device_facts(streamed.tier)),
    }


def live_facts(engine: Engine) -> dict[str, Any]:
    """What changes while a model streams: its counts, what it holds (a 1 per expert of a layer that is in memory), and how
    much of the routing a lossy mode let run."""
    return {
        **engine.stats.row(),
        "policy": engine.policy.entry.name,
        "expert_resident_bytes": engine.held_bytes,
        "resident": [_ones(engine.policy.resident(layer.number)[: layer.experts]) for layer in engine.layers],
        **lossy_facts(engine),
    }


def _ones(here_E: Any) -> str:
    return "".join("01"[int(here)] for here in here_E)


def lossy_facts(engine: Engine) -> dict[str, Any]:
    """Whether outputs are those of the resident model, and if not, by which mode, so set, and how much of the routing ran."""
    if engine.lossy is None:
        return {}
    stats = engine.stats
    return {
        "lossy": {"mode": engine.lossy.entry.name, "options": engine.lossy.options},
        "overlap": stats.overlap,
        "deferred": stats.deferred,
    }


def logits_of(model: Any, ids: list[int]) -> Tensor:
    """Logits [1, T, V] of one pass over `ids`."""
    with torch.inference_mode():
        return model(torch.tensor([ids], device=next(model.parameters()).device)).logits
