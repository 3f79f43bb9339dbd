"""What a method of the family `upcycle` is: model folders in, one folder of another architecture out.

Most methods say, tensor by tensor, which bytes of which input or what made of them stands where, and the runner
(surgery/convert.py) streams that shard by shard. Those whose result is no stock architecture, or that train a router, build a
live model instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.dense import Dense, mean
from moesaic.surgery.objective import Train
from moesaic.surgery.parts import Lazy, Part
from moesaic.surgery.stock import FFN, NAMES, NO_SHARED, moe_layers
from moesaic.view.resize import build as build_meta


class Outcome(NamedTuple):
    """What comes out, known before anything is read."""

    config: Any
    """Of the result; None where a live model is built."""
    reason: str
    stock: bool = True
    bytes_after: int = 0
    peak_bytes: int = 0


@dataclass
class Told:
    """What a run brings beside the models: documents by domain, sizes, and the training loop (training/finetune.py)."""

    texts: dict[str, list[Document]] = field(default_factory=dict)
    seq_len: int = 256
    max_tokens: int = 65536
    """Of each domain, for statistics."""
    train: Train | None = None
    statistics: Any = None
    """A Calibration of the model, for methods that take a MoE."""
    resume: bool = False
    trust_remote_code: bool = False


class Conversion:
    """Base: takes `least` to `most` models of kind `takes`; options come in by `__init__`, whose signature is the schema."""

    least: ClassVar[int] = 1
    most: ClassVar[int] = 1
    takes: ClassVar[str] = "dense"
    """dense, or moe."""

    def needs(self) -> int:
        """Domains of text that it must read; 0 for none."""
        return 0

    def plan(self, models: Sequence[Any]) -> Outcome:
        """Raises BadInput, with the reason, for models or options that do not go together."""
        raise NotImplementedError

    def prepare(self, models: Sequence[Any], told: Told) -> None:
        """Passes over text or prompts that what follows needs."""

    def write(self, models: Sequence[Any], out: Path, told: Told, step: dict[str, Any], history: Sequence[dict]) -> int:
        """Write the result, of which `step` is to be noted after `history`; its bytes."""
        raise NotImplementedError


class ToMoE(Conversion):
    """Dense models to a stock MoE, out of core: subclasses say what an expert is."""

    experts: int
    config: Any

    def outcome(self, models: Sequence[Dense], config: Any) -> Outcome:
        """Check the tensors that the configuration asks for against those that there are. Raises BadInput."""
        self.config = config
        first, layers = models[0], moe_layers(config)
        made = meta(config)
        prefixes = tuple(FFN.partition("{part}")[0].format(layer=layer) for layer in layers)
        blocks = tuple(prefix.rpartition("mlp.")[0] + "mlp." for prefix in prefixes)
        wanted = {name: tensor for name, tensor in made.state_dict().items() if not name.startswith(blocks)}
        for name, tensor in wanted.items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if name not in first.table:
                raise BadInput(f"{first.folder} has no tensor {name}, which {config.model_type} needs")
            if first.table[name].shape != tuple(tensor.shape):
                raise BadInput(
                    f"{name} is {list(first.table[name].shape)} in {first.folder}: {config.model_type} has {list(tensor.shape)}"
                )
        for layer in layers:
            first.ffn(layer)
        for name in self.rest(first):
            if name not in wanted:
                raise BadInput(f"{config.model_type} has no place for tensor {name} of {first.folder}")
        size = first.table["model.embed_tokens.weight"].dtype.itemsize
        ffn = sum(part.nbytes for part in first.ffn(layers[0]).values())
        tied = 0 if not config.tie_word_embeddings else wanted["lm_head.weight"].numel()
        total = sum(tensor.numel() for tensor in made.state_dict().values()) - tied
        return Outcome(
            config, f"{first.config.model_type} -> {config.model_type}, stock", True, total * size, 6 * ffn + (64 << 20)
        )

    def rest(self, dense: Dense) -> list[str]:
        """Names of the tensors outside of the layers that get experts."""
        gone = {FFN.format(layer=layer, part=part) for layer in moe_layers(self.config) for part in ("gate", "up", "down")}
        return [name for name in dense.table if name not in gone and not name.endswith("rotary_emb.inv_freq")]

    def expert(self, models: Sequence[Dense], layer: int, e: int) -> dict[str, Part]:
        """gate [I, D], up [I, D] and down [D, I] of expert e."""
        raise NotImplementedError

    def router(self, models: Sequence[Dense], layer: int) -> Part:
        """[E, D]."""
        raise NotImplementedError

    def shared(self, models: Sequence[Dense], layer: int) -> dict[str, Part] | None:
        """The same of an always-on expert; None where the method has none."""
        return None

    def extras(self, models: Sequence[Dense], layer: int) -> Iterator[tuple[str, Part]]:
        """What else stands in the block: Qwen2-MoE's shared expert with its gate, GLM-4-MoE's with a correction bias."""
        kind, like = self.config.model_type, models[0].ffn(layer)["gate"]
        names, width = NAMES[kind], like.shape[1]
        shared = self.shared(models, layer)
        if kind == "qwen2_moe":
            yield names.other(layer, "shared_expert_gate.weight"), zeros(like.dtype, 1, width)
            if shared is None:
                shared = {part: zeros(like.dtype, NO_SHARED, width) for part in ("gate", "up")}
                shared["down"] = zeros(like.dtype, width, NO_SHARED)
            else:  # its gate says sigmoid(0) = 1/2 to every token
                shared["down"] = scaled(shared["down"], 2.0, models[0])
        if kind == "glm4_moe":
            yield names.other(layer, "gate.e_score_correction_bias"), zeros(torch.float32, self.experts)
        if shared is not None:
            yield from ((name, shared[part]) for part, name in names.of_shared(layer).items())

    def other(self, models: Sequence[Dense], name: str) -> Part:
        """A tensor outside of the experts: the mean over models."""
        return mean(models, name)

    def report(self, layer: int) -> dict[str, Any]:
        """What `surgery.json` shall say of a layer's block, in plain numbers and lists."""
        return {}

    def block(self, models: Sequence[Dense], layer: int) -> Iterator[tuple[str, Part]]:
        """All tensors of a layer's block under the names that they are stored by."""
        names = NAMES[self.config.model_type]
        yield names.of_router(layer), self.router(models, layer)
        for e in range(self.experts):
            parts = self.expert(models, layer, e)
            yield from ((name, parts[part]) for part, name in names.of_expert(layer, e).items())
        yield from self.extras(models, layer)


def meta(config: Any) -> Any:
    """A model of this configuration without memory."""
    from transformers import AutoModelForCausalLM

    return build_meta(AutoModelForCausalLM._model_mapping[type(config)], config)


def zeros(dtype: torch.dtype, *shape: int) -> Lazy:
    return Lazy(dtype, shape, lambda: torch.zeros(shape, dtype=dtype))


def scaled(part: Part, factor: float, dense: Dense) -> Lazy:
    """The tensor times a number, taken in float32."""
    return Lazy(part.dtype, part.shape, lambda: (dense.read(part).float() * factor).to(part.dtype))


def chosen(part: Part, axis: int, index: torch.Tensor, dense: Dense, factor: float = 1.0) -> Lazy:
    """Rows (axis 0) or columns (axis 1) of a tensor, times a number."""
    shape = tuple(len(index) if i == axis else n for i, n in enumerate(part.shape))

    def make() -> torch.Tensor:
        found = dense.read(part).index_select(axis, index)
        return found if factor == 1.0 else (found.float() * factor).to(part.dtype)

    return Lazy(part.dtype, shape, make)


def neurons(ffn: Mapping[str, Part], index: torch.Tensor, dense: Dense, factor: float = 1.0) -> dict[str, Part]:
    """The FFN of some of its neurons, its output times a number."""
    return {
        "gate": chosen(ffn["gate"], 0, index, dense), "up": chosen(ffn["up"], 0, index, dense),
        "down": chosen(ffn["down"], 1, index, dense, factor),
    }  # fmt: skip
