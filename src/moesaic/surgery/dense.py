"""Dense checkpoints open for conversion: configuration, tokenizer and where each tensor lies; weights are read one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.store import Range, Reader
from moesaic.store.table import Table
from moesaic.surgery.parts import Lazy, Part, get
from moesaic.surgery.stock import FFN
from moesaic.view import files, resolve_model


class Dense:
    """A folder of a dense model of plain safetensors. Raises BadInput for what is none."""

    def __init__(self, path: str | Path, reader: Reader, trust_remote_code: bool = False) -> None:
        from transformers import AutoConfig

        self.folder, self.reader = local_folder(path), reader
        files.read_config(self.folder)
        try:
            self.config: Any = AutoConfig.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.folder}/config.json: {str(error).splitlines()[0]}") from error
        if getattr(self.config, "quantization_config", None):
            raise BadInput(f"{self.folder} is quantised: convert the checkpoint that it was made of")
        self.table = Table.of_folder(self.folder)

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def ffn(self, layer: int) -> dict[str, Range]:
        """gate [I, D], up [I, D], down [D, I] of a decoder layer's FFN. Raises BadInput where it is not stored so."""
        found = {}
        for part in ("gate", "up", "down"):
            name = FFN.format(layer=layer, part=part)
            if name not in self.table:
                raise BadInput(f"{self.folder} has no tensor {name}: its FFNs are not gate, up and down of a Llama-like model")
            found[part] = self.table[name]
        return found

    def read(self, part: Part) -> Tensor:
        return get(part, self.reader)


def local_folder(path: str | Path) -> Path:
    """The folder of a MODEL; a hub id is brought here first."""
    found = resolve_model(path)
    if isinstance(found, Path):
        return found
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(found, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]))


SAME = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
)  # fmt: skip
"""Fields of the configuration in which models that become one must agree."""


def check_alike(models: Sequence[Dense]) -> None:
    """Raises BadInput where models differ in architecture, sizes, tensors or tokenizer, naming the model and what."""
    first = models[0]
    for model in models[1:]:
        for name in SAME:
            mine, theirs = getattr(first.config, name, None), getattr(model.config, name, None)
            if mine != theirs:
                raise BadInput(
                    f"{model.folder} and {first.folder} differ in {name}: {theirs} and {mine}; they must be of one model"
                )
        for name in first.table:
            if name not in model.table:
                raise BadInput(f"{model.folder} has no tensor {name}, which {first.folder} has")
            if (model.table[name].shape, model.table[name].dtype) != (first.table[name].shape, first.table[name].dtype):
                raise BadInput(
                    f"{name} is {model.table[name].dtype} {list(model.table[name].shape)} in {model.folder}, "
                    f"{first.table[name].dtype} {list(first.table[name].shape)} in {first.folder}"
                )
        extra = next((name for name in model.table if name not in first.table), None)
        if extra is not None:
            raise BadInput(f"{first.folder} has no tensor {extra}, which {model.folder} has")
        held = [folder / "tokenizer.json" for folder in (first.folder, model.folder)]
        if held[0].is_file() != held[1].is_file() or (held[0].is_file() and held[0].read_bytes() != held[1].read_bytes()):
            raise BadInput(f"{model.folder} and {first.folder} have different tokenizers: experts must read the same tokens")


def mean(models: Sequence[Dense], name: str) -> Part:
    """A tensor as the mean over models, taken in float64, so that the mean of equal tensors is that tensor, bit for bit."""
    held = [model.table[name] for model in models]
    if len(models) == 1 or not held[0].dtype.is_floating_point:
        return held[0]

    def make() -> Tensor:
        total = torch.zeros(held[0].shape, dtype=torch.float64)
        for model, each in zip(models, held, strict=True):
            total += model.reader.read(each)
        return (total / len(held)).to(held[0].dtype)

    return Lazy(held[0].dtype, held[0].shape, make)
