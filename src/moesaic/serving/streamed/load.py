"""Load a model whose experts stay on disk: transformers builds and loads it, and never sees an expert's bytes.

transformers' own loader gets, in place of the checkpoint's tensors, objects that read one when it is asked for; those of
experts give a tensor without memory. So names, conversions, dtypes, tied weights and missing keys are handled by the very
code that loads the resident model, and the expert parameters arrive on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.serving.streamed import sources
from moesaic.store import Range, Reader, Table
from moesaic.view import discover, files, load, resolve_model
from moesaic.view.load import Loaded


class Skeleton(NamedTuple):
    """A model without experts, its tokenizer, and where each expert matrix lies: `sources[parameter name]`."""

    loaded: Loaded
    sources: dict[str, sources.Source]


class _OnDisk:
    """What transformers takes for a slice of a safetensors file: read when indexed."""

    def __init__(self, stored: Range, reader: Reader) -> None:
        self.stored, self.reader = stored, reader

    def __getitem__(self, _: Any) -> Tensor:
        return self.reader.read(self.stored)


class _Absent:
    """The same for a tensor that is not to be read: shape and dtype, no memory."""

    def __init__(self, stored: Range) -> None:
        self.stored = stored

    def __getitem__(self, _: Any) -> _Absent:
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.stored.shape, dtype=dtype or self.stored.dtype, device="meta")


def expert_parameters(model: Any) -> dict[str, tuple[int, int]]:
    """Name of each stacked matrix -> number of its block, and 0 (first product) or 1 (second)."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for block, place in enumerate(discover.find(model)):
        experts: Any = place.experts
        for which, matrix in enumerate(("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")):
            found[f"{names[experts]}.{matrix}".lstrip(".")] = (block, which)
    return found


def load_skeleton(path_or_id: str | Path, reader: Reader, **how: Any) -> Skeleton:
    """The model of a checkpoint in eval mode, on the CPU, its expert matrices on the meta device. `how`: see `view.load`.

    Raises BadInput for what cannot be streamed, before any weight is read.
    """
    source = resolve_model(path_or_id)
    if isinstance(source, Path):
        if files.read_config(source).get("quantization_config"):
            raise BadInput(f"{source} is quantised: experts stream from bfloat16, float16 or float32 checkpoints only")
        Table.of_folder(source)
    caught: dict[str, sources.Source] = {}
    classes: list[type] = []

    def without_experts(model_class: Any) -> Any:
        classes.append(model_class)
        # a subclass for this one call: nothing global is patched, and the model gets its own class back below
        return type(
            model_class.__name__,
            (model_class,),
            {
                "__module__": model_class.__module__,
                "_load_pretrained_model": staticmethod(_loader(model_class, reader, caught)),
            },
        )

    loaded = load(source, experts="moesaic", adapt=without_experts, **how)
    loaded.model.__class__ = classes[0]
    return Skeleton(loaded, caught)


def _loader(model_class: Any, reader: Reader, caught: dict[str, sources.Source]) -> Callable:
    def load_weights(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any) -> Any:
        if load_config.is_quantized or not checkpoint_files:
            raise BadInput(f"{type(model).__name__}: experts stream from plain safetensors files only")
        table = Table.of_files(checkpoint_files)
        found, keys = sources.find(model, load_config.weight_mapping or [], table, expert_parameters(model))
        caught.update(found)
        tensors = {name: _Absent(stored) if name in keys else _OnDisk(stored, reader) for name, stored in table.items()}
        return model_class._load_pretrained_model(model, tensors, checkpoint_files, load_config, *rest)

    return load_weights
