"""Calibration of a checkpoint of any size: one decoder layer in memory at a time, every weight read once.

The hidden states between layers wait on disk (trace/calibration/relay.py). A model whose layers share more than hidden states
cannot be taken apart so; a tiny model of its class shows that, and it is then loaded whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.core.primitives import keep_few
from moesaic.models.reshaped.classes import architecture_of
from moesaic.store import Reader
from moesaic.surgery.checkpoint import Checkpoint, put
from moesaic.trace.calibration import Calibration, calibrate
from moesaic.trace.calibration.relay import Relay, Stop
from moesaic.view import View, tiny
from moesaic.view.load import load


def measure(
    path: str | Path,
    documents: Iterable[Document],
    out: str | Path,
    tiers: Sequence[str],
    *,
    by_domain: bool = False,
    context: int | None = None,
    every: int = 1,
    source: str = "",
    resume: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **how: Any,
) -> Calibration:
    """`trace.calibration.calibrate` on a folder, whatever its size. `how`: see `moesaic.load`.

    Memory: the weights of one decoder layer, its statistics, and one batch. Tier B, and models that cannot be taken layer by
    layer, are loaded whole. Raises BadInput.
    """
    keep_few()
    options: dict[str, Any] = {
        "tiers": tuple(tiers), "by_domain": by_domain, "context": context, "every": every, "source": source, "name": str(path),
        "resume": resume, "progress": progress,
    }  # fmt: skip
    with Reader("keep") as reader:
        checkpoint = Checkpoint(path, reader, **how)
        if checkpoint.tokenizer is None:
            raise BadInput(f"{path} has no tokenizer: calibration reads text; put its tokenizer files beside config.json")
        if "B" in tiers or not relayable(type(checkpoint.model)):
            return calibrate(load(path, **how), documents, out, **options)
        pages = Pages(checkpoint)
        return calibrate(
            checkpoint.model, documents, out, tokenizer=checkpoint.tokenizer, layers_at_once=1, pages=pages.group, **options
        )


class Pages:
    """The weights of a group of layers, while the group's passes run; and what stands outside of all layers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.model = checkpoint, checkpoint.model

    @contextmanager
    def group(self, relay: Relay, number: int, made: dict[str, torch.Tensor] | None = None) -> Iterator[None]:
        """`made`: tensors of MoE block `number`, by name, that are in its place in the model and take that of its own."""
        if relay.broken:
            raise BadInput(f"{self.checkpoint.folder}: its decoder layers cannot be taken one by one")
        name = next(n for n, module in self.model.named_modules() if module is relay.stack)
        last = relay.starts[number + 1] if number + 1 < len(relay.groups) else len(relay.stack)
        prefixes = tuple(f"{name}.{i}." for i in range(relay.starts[number], last))
        embeddings = _embeddings(self.model, name)
        with ExitStack() as stack:
            stack.enter_context(put(self.model, self._within(prefixes, None if made is None else number) | (made or {})))
            stack.enter_context(put(self.model, self._outside(name, embeddings if number else {})))
            for module in embeddings.values() if number else ():
                stack.enter_context(_blank(module))
            yield

    def _within(self, prefixes: tuple[str, ...], without: int | None) -> dict[str, torch.Tensor]:
        """Of the layers under these prefixes, but for the MoE block `without`."""
        found: dict[str, torch.Tensor] = {}
        left: set[str] = set()
        for i, pair in enumerate(self.checkpoint.matrices):
            if i == without:
                left = {*pair, *self.checkpoint.of_block[i]}
            elif pair[0].startswith(prefixes):
                found |= dict(zip(pair, self.checkpoint.bank(i), strict=True))
        names = [
            n for n, tensor in self.checkpoint.own.items()
            if n.startswith(prefixes) and tensor.is_meta and n not in found and n not in left
        ]  # fmt: skip
        return found | self.checkpoint.read(names)

    def _outside(self, stack: str, skipped: dict[str, nn.Embedding]) -> dict[str, torch.Tensor]:
        """What is in no layer, but for the head, which no pass reaches, and for the embeddings after the first group."""
        head = self.model.get_output_embeddings()
        left = (
            {id(p) for p in head.parameters()} if head is not None and head is not self.model.get_input_embeddings() else set()
        )
        left -= {id(module.weight) for module in _embeddings(self.model, stack).values()}  # a tied head is the table
        left |= {id(module.weight) for module in skipped.values()}
        names = [
            n for n, tensor in self.checkpoint.own.items()
            if tensor.is_meta and not n.startswith(stack + ".") and id(tensor) not in left
        ]  # fmt: skip
        return self.checkpoint.read(names)


def _embeddings(model: nn.Module, stack: str) -> dict[str, nn.Embedding]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Embedding) and not n.startswith(stack + ".")}


@contextmanager
def _blank(module: nn.Embedding) -> Iterator[None]:
    """Let a table without memory answer with zeros: what it gives is not looked at."""

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, module.embedding_dim, dtype=module.weight.dtype)

    module.forward = forward  # type: ignore[assignment]
    try:
        yield
    finally:
        del module.forward


def relayable(model_class: Any) -> bool:
    """Whether models of a class can be taken layer by layer: tried on a tiny random one (of its architecture)."""
    model = tiny.build(architecture_of(model_class))
    blocks = View(model)
    given = tiny.inputs(model, batch=1)
    groups = [[i] for i in range(len(blocks))]
    with TemporaryDirectory(prefix="moesaic-relay-") as folder:
        relay = Relay(blocks, groups, Path(folder) / "relay")
        if relay.broken or "input_ids" not in given:
            return False

        def run() -> None:
            with torch.no_grad():
                try:
                    model(**copy.copy(given), use_cache=False)
                except Stop:
                    return

        try:
            for number in range(len(groups)):
                relay.batch(0)
                relay.check(number, run)
                with relay.group(number):
                    run()
                if relay.broken:
                    return False
        except Exception:  # what a tiny model of this class needs that is not here
            return False
    return True
