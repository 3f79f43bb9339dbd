"""Run a MoE that does not fit: experts stay on disk and pass through a memory budget; outputs stay the same, bit for bit."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.serving.streamed import budget, device_load
from moesaic.serving.streamed.device_tier import DeviceTier
from moesaic.serving.streamed.devices import Device
from moesaic.serving.streamed.engine import GIVEN, Engine
from moesaic.serving.streamed.layer import slot_bytes, slot_kinds
from moesaic.serving.streamed.lossy.mode import Lossy
from moesaic.serving.streamed.stats import Stats
from moesaic.store import PageCache, Reader
from moesaic.trace import sweep
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies.history import History
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.view import View
from moesaic.view.skeleton import expert_parameters, load_skeleton

__all__ = ["Engine", "Stats", "Streamed", "load_streamed"]

WHY_NOT = {"future": "nobody knows it while a model runs", "tokens": "its predictor reads whole texts"}


class Streamed:
    """A model that runs as any other of transformers, with `engine` behind its experts, and `tier` between them where a device
    was asked for. Close it, or use it in a `with`."""

    def __init__(self, model: Any, tokenizer: Any, engine: Engine, tier: DeviceTier | None = None) -> None:
        self.model, self.tokenizer, self.engine, self.tier = model, tokenizer, engine, tier

    @property
    def stats(self) -> Stats:
        return self.engine.stats

    def close(self) -> None:
        if self.tier is not None:
            self.tier.close()
        self.engine.close()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def load_streamed(
    path_or_id: str | Path,
    *,
    memory: int | str | None = None,
    resident: float | None = None,
    policy: str | Policy = "lru",
    history: History | None = None,
    prefetch_bytes: int | None = None,
    lossy: str | Lossy | None = None,
    hardware: Hardware | None = None,
    device: str | Device | None = None,
    device_memory: int | str | None = None,
    device_policy: str | Policy = "lru",
    page_cache: PageCache = "direct",
    threads: int = 4,
    timeout: float = 60.0,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    reader: Reader | None = None,
    **how: Any,
) -> Streamed:
    """Load a checkpoint with its experts left on disk, for inference on the CPU, or on a device above it.

    Args:
        path_or_id: a folder of safetensors, a hub id, or "bundled".
        memory: bytes that experts may take, an int or text such as "6GiB". Or `resident`: their share, above 0 to 1.
            All other weights come on top; so do biases of experts, which stay in memory.
        policy: a registered cache policy, `name` or `name:option=value+option=value`, or a built one.
        history: earlier routing, for policies that learn (`trace.replay.history_of`).
        prefetch_bytes: what a policy that guesses may read ahead in one pass; default: what one token's experts take.
        lossy: a registered lossy mode, written like a policy, or a built one: less is read, and the output changes.
        hardware: what policies that schedule are told of the machine.
        device: where all else lies, keys and values too: "cuda", "cuda:1", or "stand-in" (plain memory in its place). Experts
            then pass through `device_memory` bytes there, by `device_policy`; `memory`, or all of it, is the tier below.
        page_cache: "direct" reads past the kernel's page cache; "keep" lets it hold what was read, "drop" makes it forget.
        threads, timeout: reads in flight, and seconds after which a read without an answer is an error.
        dtype, attention, how: see `moesaic.load`.

    Raises BadInput for a checkpoint that cannot be streamed, a budget too small (with the minimum), or a policy that needs
    what a running model cannot give; ReadFailed for reads.
    """
    if prefetch_bytes is not None and prefetch_bytes < 0:
        raise BadInput(f"prefetch of {prefetch_bytes} bytes in a pass: give 0 or more")
    built = sweep.build(policy) if isinstance(policy, str) else policy
    mode = sweep.build(lossy, "lossy", "--lossy") if isinstance(lossy, str) else lossy
    unmet = sorted(built.needs - GIVEN)
    if unmet:
        why = "; ".join(WHY_NOT.get(need, "nothing brings it") for need in unmet)
        needs = ", ".join(unmet)
        raise MissingNeed(f"policy {built.entry.name} needs {needs}, which a running model does not give ({why}): replay it")
    if not built.exact:
        raise BadInput(f"policy {built.entry.name} changes the model, which must be trained for it: replay it")
    if history is not None and built.learns:
        built.learn(history)
    if (device is None) != (device_memory is None):
        raise BadInput("device and device_memory go together: give --device, and --device-memory for its experts")
    if device is not None and memory is None and resident is None:
        resident = 1.0
    own = reader is None
    reader = Reader(page_cache, threads, timeout) if reader is None else reader
    try:
        loaded, sources, *_ = load_skeleton(path_or_id, reader, dtype=dtype, attention=attention, **how)
        view = View(loaded.model)
        names = {place: name for name, place in expert_parameters(loaded.model).items()}
        pairs = [(sources[names[i, 0]], sources[names[i, 1]]) for i in range(len(view))]
        bytes_LE = [slot_bytes(block, pair) for block, pair in zip(view, pairs, strict=True)]
        kinds_LE = [slot_kinds(block, pair) for block, pair in zip(view, pairs, strict=True)]
        shape = Shape.of_experts(bytes_LE, max(block.top_k for block in view))
        sizes = dict(zip(chain(*kinds_LE), chain(*bytes_LE), strict=True))
        given = budget.budget_of(shape.total_bytes, memory, resident)
        plan = budget.divide(given, shape.total_bytes, list(sizes.values()))
        engine = Engine(
            view, {place: sources[name] for place, name in names.items()}, reader, built, plan, shape,
            prefetch_bytes=prefetch_bytes, hardware=hardware, lossy=mode,
        )  # fmt: skip
        tier = None
        if device is not None and device_memory is not None:
            tier = device_load.over_disk(
                view, engine, device, device_memory, policy=device_policy, history=history, hardware=hardware
            )
    except BaseException:
        if own:
            reader.close()
        raise
    return Streamed(loaded.model, loaded.tokenizer, engine, tier)
