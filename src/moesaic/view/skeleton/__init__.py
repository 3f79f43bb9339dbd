"""Load a model whose experts stay on disk: transformers builds and loads it, and never sees an expert's bytes.

transformers' own loader gets, in place of the checkpoint's tensors, objects that read one when it is asked for; those of
experts give a tensor without memory. So names, conversions, dtypes, tied weights and missing keys are handled by the very
code that loads the resident model, and the expert parameters arrive on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.core_model_loading import set_param_for_module

from moesaic.core.errors import BadInput
from moesaic.store import Range, Reader, Table
from moesaic.store.packed import NAMES, Packed, read_packed
from moesaic.view import files, load, quantised, resolve_model
from moesaic.view.discover import expert_parameters
from moesaic.view.load import Loaded
from moesaic.view.packed import with_weights
from moesaic.view.skeleton import packed_sources, sources
from moesaic.view.skeleton.packed_sources import Sourced
from moesaic.view.skeleton.sources import Other

__all__ = ["Skeleton", "Survey", "expert_parameters", "load_skeleton", "survey"]


class Skeleton(NamedTuple):
    """A model without experts, its tokenizer, and where each expert matrix lies: `sources[parameter name]`."""

    loaded: Loaded
    sources: dict[str, Sourced]
    others: dict[str, Other]
    table: Table


class _OnDisk:
    """What transformers takes for a slice of a safetensors file: read when indexed."""

    def __init__(self, stored: Range, reader: Reader) -> None:
        self.stored, self.reader = stored, reader

    def __getitem__(self, _: Any) -> Tensor:
        return self.reader.read(self.stored)

    def get_dtype(self) -> str:
        return NAMES[self.stored.dtype]


class _Absent:
    """The same for a tensor that is not to be read: shape and dtype, no memory."""

    def __init__(self, stored: Range) -> None:
        self.stored = stored

    def __getitem__(self, _: Any) -> _Absent:
        return self

    def get_dtype(self) -> str:
        return NAMES[self.stored.dtype]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.stored.shape, dtype=dtype or self.stored.dtype, device="meta")


class Survey(NamedTuple):
    """What a checkpoint holds, known without reading a weight: the model has no memory behind it."""

    model: Any
    table: Table
    sources: dict[str, Sourced]
    others: list[Range]
    """Tensors that are of no expert."""
    collected: dict[str, Other]
    """The parameters they make, by name (the first, of those made together); none of a packed folder."""


class _Surveyed(Exception):
    """Ends a load where weights would be read."""

    def __init__(self, found: Survey) -> None:
        self.found = found


def load_skeleton(path_or_id: str | Path, reader: Reader, bare: bool = False, **how: Any) -> Skeleton:
    """The model of a checkpoint in eval mode, on the CPU, its expert matrices on the meta device. `how`: see `view.load`.

    With `bare`, so is everything else that the checkpoint holds. Raises BadInput for what cannot be streamed, before any
    weight is read.
    """
    caught: list[Survey] = []

    def load_weights(model_class: Any, found: Survey, arguments: tuple[Any, ...]) -> Any:
        caught.append(found)
        present = set() if bare else {tensor.name for tensor in found.others}
        tensors = {n: _OnDisk(stored, reader) if n in present else _Absent(stored) for n, stored in found.table.items()}
        done = model_class._load_pretrained_model(found.model, tensors, *arguments)
        for name, source in found.sources.items():
            if isinstance(source, packed_sources.PackedSource):  # of no file that transformers knows
                own = found.model.get_parameter(name)
                set_param_for_module(found.model, name, torch.empty_like(own, device="meta"), done[0], cast(Any, None))
        return done

    loaded = _load(path_or_id, load_weights, how)
    return Skeleton(loaded, caught[0].sources, caught[0].collected, caught[0].table)


def survey(path_or_id: str | Path, **how: Any) -> Survey:
    """Where the experts of a checkpoint lie, and what else there is. Raises BadInput for what cannot be streamed."""

    def load_weights(model_class: Any, found: Survey, arguments: tuple[Any, ...]) -> Any:
        raise _Surveyed(found)

    try:
        _load(path_or_id, load_weights, how)
    except _Surveyed as end:
        return end.found
    raise AssertionError("transformers loads weights in one call")


def _load(path_or_id: str | Path, load_weights: Callable[[Any, Survey, tuple[Any, ...]], Any], how: dict[str, Any]) -> Loaded:
    """`view.load`, in which `load_weights(class, survey, arguments)` does what the class's own would."""
    source = resolve_model(path_or_id)
    packed = None
    if isinstance(source, Path):
        how = {**how, **quantised.widening(files.read_config(source), source)}
        Table.of_folder(source)
        packed = read_packed(source)
    classes: list[type] = []

    def own_weights(model_class: Any) -> Any:
        def instead(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
            return load_weights(
                model_class, _survey(model, checkpoint_files, load_config, packed), (checkpoint_files, load_config, *rest)
            )

        classes.append(model_class)
        return with_weights(model_class, instead)

    loaded = load(source, experts="moesaic", adapt=own_weights, **how)
    loaded.model.__class__ = classes[0]
    return loaded


def _survey(model: Any, checkpoint_files: Any, load_config: Any, packed: Packed | None) -> Survey:
    if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
        raise BadInput(f"{type(model).__name__}: experts stream from safetensors files only")
    if load_config.is_quantized:  # of a hub id, whose config.json was not looked at before
        quantised.widening(
            {"quantization_config": load_config.hf_quantizer.quantization_config.to_dict()}, type(model).__name__
        )
    table = Table.of_files(checkpoint_files)
    if packed is not None:
        return Survey(model, table, packed_sources.find(model, packed), list(table.values()), {})
    collected = sources.collect(model, load_config.weight_mapping or [], table)
    found, keys = sources.find(model, collected, table, expert_parameters(model))
    rest = {name: other for name, other in collected.items() if not _feeds(other, keys)}
    return Survey(model, table, dict(found), [stored for name, stored in table.items() if name not in keys], rest)


def _feeds(other: Other, keys: set[str]) -> bool:
    return any(stored.name in keys for ranges in other.lists.values() for stored in ranges)
