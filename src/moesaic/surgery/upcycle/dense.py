"""A MoE becomes a dense model: one expert of each layer, their average, or the neurons of several in one wide FFN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.card import write_notes
from moesaic.surgery.checkpoint import Checkpoint
from moesaic.surgery.conversion import Conversion, Outcome, Told, meta, zeros
from moesaic.surgery.parts import Lazy, Part, get
from moesaic.surgery.shards import MADE, Shards, copy_files
from moesaic.surgery.stock import FFN, dense_config

HOW = ("average", "one", "concat")
PARTS = ("gate", "up", "down")


@register("upcycle", "dense", card="surgery-and-steering.md#upcycling-baselines", exact=False)
class ToDense(Conversion):
    """`how`: average (weighted by how often they are chosen), one (`expert`, or the one most chosen), concat (the `keep`
    experts of most gate weight, all by default, side by side as one FFN, each at its share of that weight).

    Use comes from calibration (--data or --statistics); without, all experts count alike. Equal experts come out as the one
    that they are copies of, and concat of all experts computes what soft routing with those fixed weights would. A shared
    expert that a gate scales per token (Qwen2-MoE) joins at half its output, what its gate says to a token it does not know.
    Narrower layers are filled up with neurons of zeros, which change nothing.
    """

    takes = "moe"

    def __init__(self, how: str = "average", expert: int | None = None, keep: int | None = None) -> None:
        if how not in HOW:
            raise BadInput(f"how={how!r}: one of {', '.join(HOW)}")
        if expert is not None and how != "one":
            raise BadInput(f"expert={expert}: how={how} takes no one expert; choose how=one")
        if keep is not None and (how != "concat" or keep < 1):
            raise BadInput(f"keep={keep}: how many experts how=concat puts side by side, at least 1")
        self.how, self.one, self.keep = how, expert, keep

    def plan(self, models: Sequence[Any]) -> Outcome:
        """Of a Checkpoint, or of the Plan of a step before."""
        source = models[0]
        config, facts = source.model.config, source.facts
        counts = getattr(source, "experts", None) or [each.experts for each in facts]
        if self.one is not None and not 0 <= self.one < min(counts):
            raise BadInput(f"expert={self.one}: there are {min(counts)} experts")
        if self.keep is not None and self.keep > min(counts):
            raise BadInput(f"keep={self.keep}: there are {min(counts)} experts")
        wide = (self.keep or max(counts)) if self.how == "concat" else 1
        self.held = getattr(config, "shared_expert_intermediate_size", 0)
        width = wide * facts[0].inner + self.held
        if len(facts) < config.num_hidden_layers:
            width = max(width, config.intermediate_size)
        self.config, self.width = dense_config(config, width), width
        made = meta(self.config)
        size = next(source.model.parameters()).element_size()
        tied = made.get_output_embeddings().weight.numel() if self.config.tie_word_embeddings else 0
        if isinstance(source, Checkpoint):
            self.rest(source)
        total = (sum(tensor.numel() for tensor in made.state_dict().values()) - tied) * size
        reason = f"{config.model_type} -> {self.config.model_type}, stock, FFNs of {width}"
        return Outcome(self.config, reason, True, total, 6 * width * facts[0].width * 4 + (64 << 20))

    def prepare(self, models: Sequence[Checkpoint], told: Told) -> None:
        self.shares = [self._shares(each.experts, told, i) for i, each in enumerate(models[0].facts)]

    def _shares(self, experts: int, told: Told, i: int) -> Tensor:
        """What each expert counts, [E], summing to 1."""
        found = torch.ones(experts, dtype=torch.float64)
        if told.statistics is not None:
            layer = told.statistics.layer(i, None)
            found = torch.as_tensor(layer["gate_sum"] if self.how == "concat" else layer.frequency_E).double()
        if self.how == "one":
            best = int(found.argmax()) if self.one is None else self.one
            found = torch.nn.functional.one_hot(torch.tensor(best), experts).double()
        elif self.how == "concat" and self.keep is not None:
            found = found * torch.zeros(experts).index_fill(
                0, torch.argsort(found, descending=True, stable=True)[: self.keep], 1.0
            )
        return found / found.sum()

    def ffn(self, source: Checkpoint, i: int) -> dict[str, Tensor]:
        """gate [I, D], up [I, D], down [D, I] of block i's dense FFN, in the model's dtype."""
        share_E = self.shares[i]
        used = torch.nonzero(share_E).flatten().tolist()
        dtype = source.own[source.matrices[i][0]].dtype
        parts: dict[str, list[Tensor]] = {part: [] for part in PARTS}
        for e in used:
            first, down = (stack[0] for stack in source.bank(i, [e]))
            gate, up = first.chunk(2)
            for part, tensor in zip(PARTS, (gate, up, down), strict=True):
                weight = float(share_E[e])
                if self.how != "concat":
                    parts[part] = [(parts[part][0] if parts[part] else 0) + weight * tensor.double()]
                else:
                    parts[part].append(tensor if part != "down" or weight == 1 else (weight * tensor.double()).to(dtype))
        if self.held:
            prefix = f"model.layers.{source.facts[i].layer}.mlp.shared_expert."
            for part in PARTS:
                tensor = source.reader.read(source.table[f"{prefix}{part}_proj.weight"])
                parts[part].append(tensor * 0.5 if part == "down" else tensor)
        return {
            part: _filled(torch.cat([t.to(dtype) for t in found], int(part == "down")), int(part == "down"), self.width)
            for part, found in parts.items()
        }

    def rest(self, source: Checkpoint) -> list[tuple[str, Part]]:
        """What is in no FFN. Raises BadInput for what the checkpoint lacks."""
        wanted = dict(meta(self.config).state_dict())
        if self.config.tie_word_embeddings:
            wanted.pop("lm_head.weight", None)
        found: list[tuple[str, Part]] = []
        for name, tensor in wanted.items():
            if ".mlp." in name:
                continue
            if name in source.table and source.table[name].shape == tuple(tensor.shape):
                found.append((name, source.table[name]))
            elif name.endswith("_proj.bias"):
                found.append((name, zeros(tensor.dtype, *tensor.shape)))
            else:
                raise BadInput(
                    f"{source.folder} has no tensor {name} {list(tensor.shape)}, which {self.config.model_type} needs"
                )
        return found

    def tensors(self, source: Checkpoint) -> Iterator[list[tuple[str, Part]]]:
        """Shard by shard: what is in no FFN, then the FFN of each layer."""
        blocks = {each.layer: i for i, each in enumerate(source.facts)}
        yield self.rest(source)
        for layer in range(self.config.num_hidden_layers):
            names = {part: FFN.format(layer=layer, part=part) for part in PARTS}
            if layer in blocks:
                made = self.ffn(source, blocks[layer])
            else:
                made = {
                    part: _filled(source.reader.read(source.table[name]), int(part == "down"), self.width)
                    for part, name in names.items()
                }
            yield [(name, _held(made[part])) for part, name in names.items()]

    def write(self, models: Sequence[Checkpoint], out: Path, told: Told, step: dict[str, Any], history: Sequence[dict]) -> int:
        source, layers = models[0], self.config.num_hidden_layers
        made_of = {
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in source.table.files],
            "step": [step["method"], step["options"]], "shares": [share.tolist() for share in self.shares],
        }  # fmt: skip
        shards = Shards(out, source.folder, made_of, layers + 1, told.resume)
        for number, tensors in enumerate(self.tensors(source)):
            if not shards.done(number):
                shards.copy(number, tensors, source.reader)
        copy_files(source.folder, shards.partial, leave=(MADE, "surgery.json", "README.md", "config.json"))
        self.config.architectures, self.config.dtype = (
            [type(meta(self.config)).__name__],
            source.own[source.matrices[0][0]].dtype,
        )
        self.config.save_pretrained(shards.partial)
        size = shards.index()
        self._read_back(source, shards.partial)
        blocks = [{"layer": f.layer, "shares": share.tolist()} for f, share in zip(source.facts, self.shares, strict=True)]
        write_notes(shards.partial, source.folder.name, [*history, {**step, "bytes_after": size, "blocks": blocks}])
        shards.finish()
        return size

    def _read_back(self, source: Checkpoint, folder: Path) -> None:
        table = Table.of_folder(folder)
        with Reader("drop") as reader:
            for tensors in self.tensors(source):
                for name, part in tensors:
                    if not torch.equal(reader.read(table[name]), get(part, source.reader)):
                        raise BadInput(f"{folder}: {name} read back from disk is not what was written; OUT was not made")


def _filled(tensor: Tensor, axis: int, width: int) -> Tensor:
    """With zeros behind, up to `width` neurons."""
    missing = width - tensor.shape[axis]
    if not missing:
        return tensor
    shape = [missing if i == axis else n for i, n in enumerate(tensor.shape)]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _held(tensor: Tensor) -> Lazy:
    return Lazy(tensor.dtype, tuple(tensor.shape), lambda: tensor.contiguous())
