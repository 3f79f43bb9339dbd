"""Model folders as objects of the cache: what one takes in memory, known before it is read, and how it is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.serving.describe import describe
from moesaic.serving.models.cache import CachedModel
from moesaic.serving.models.fleet import Served, serving
from moesaic.store import Table
from moesaic.store.packed import read_packed
from moesaic.view import load, resolve_model
from moesaic.view.load import parse_dtype
from moesaic.view.quick import quicken

BUFFERS = 1 << 20
"""Kept for what a model computes for itself, such as the frequencies of rotary positions."""


def weight_bytes(source: str | Path, dtype: str = "auto") -> int:
    """Bytes that the weights of a model folder take when loaded in that dtype ("auto": as stored), packed experts as they lie.

    Raises BadInput for a hub id, whose files are not here, and for a folder without safetensors.
    """
    folder = resolve_model(source)
    if not isinstance(folder, Path):
        raise BadInput(f"{source} is not a folder here: how large it is has to be known before it is loaded; download it first")
    wanted = parse_dtype(dtype)
    total = BUFFERS
    for stored in Table.of_folder(folder).values():
        numbers = torch.Size(stored.shape).numel()
        narrow = wanted if isinstance(wanted, torch.dtype) and stored.dtype.is_floating_point else stored.dtype
        total += numbers * narrow.itemsize
    if read_packed(folder) is not None:
        total += sum(file.stat().st_size for file in folder.glob("experts-*-of-*.safetensors"))
    return total


def as_served(
    name: str,
    source: str | Path,
    *,
    load: dict[str, Any],
    engine: dict[str, Any],
    service: dict[str, Any],
    pinned: bool = False,
) -> CachedModel:
    """A model for a `Fleet`. `load`, `engine`, `service`: arguments of `moesaic.load`, `Engine` and `Service`."""

    def held(served: Served) -> int:
        return int(served.service.facts["resident_bytes"])

    size = weight_bytes(source, load.get("dtype", "auto"))
    return CachedModel(name, size, serving(lambda: _build(name, source, load, engine, service)), held, pinned)


def _build(name: str, source: str | Path, how: dict[str, Any], engine: dict[str, Any], service: dict[str, Any]) -> Any:
    from moesaic.serving.http.app import build
    from moesaic.serving.http.engine import Engine
    from moesaic.serving.http.service import Service

    model, tokenizer = load(source, **how)
    if tokenizer is None:
        raise BadInput(f"{source} has no tokenizer: put its tokenizer files beside config.json")
    if how.get("experts", "moesaic") == "moesaic":
        quicken(model)
    made = Engine(model, tokenizer, threads=torch.get_num_threads(), **engine)
    found = Service(made, [name], **service, facts=describe(model, resolve_model(source)))
    return found, build(found)
