"""Sequential surgery: each layer is calibrated on what the layers before it give as they are now, changed.

The decoder is walked once, whatever the method. For each MoE block the decoder layers up to it run twice over the text: as they
are, for the block's statistics (until its experts have been called), and with the changed block, for what enters the next
layer. In between, hidden states wait on disk (trace/calibration/relay.py), so that one decoder layer is in memory at a time.
What the walk keeps lies within the result's unfinished folder: the hidden states that entered the block under way stay until
the block's shard is written, so a walk that was broken off goes on at that block.
"""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.core.registry import Entry
from moesaic.store import Reader
from moesaic.surgery.apply import apply
from moesaic.surgery.checkpoint import Checkpoint
from moesaic.surgery.layer import Change, Method
from moesaic.surgery.measure import Pages, relayable
from moesaic.trace import corpus
from moesaic.trace.calibration.collect import Collector, Enough
from moesaic.trace.calibration.relay import Relay, Stop
from moesaic.trace.calibration.store import FEATURES, Calibration, CalibrationHeader, save_state
from moesaic.trace.calibration.tiers import parse
from moesaic.trace.recorder import describe

FOLDER = "sequential"


@dataclass(frozen=True)
class Text:
    """What a sequential surgery is calibrated on: see `trace.calibration.calibrate`."""

    documents: Iterable[Document]
    source: str = ""
    context: int | None = None
    by_domain: bool = False
    every: int = 1


def check_sequential(entry: Entry, method: Method, model: Any) -> None:
    """Raises BadInput for a method, with these options, or a model that cannot be operated on layer after layer."""
    what = f"{entry.family} {entry.name}, sequential"
    if not entry.needs:
        raise BadInput(f"{what}: it reads no text, so nothing changes from layer to layer: leave sequential out")
    if "B" in entry.needs:
        raise BadInput(
            f"{what}: it reads gradients (tier B), which come from the whole model at once: leave sequential out, or choose "
            "options that read none"
        )
    if method.together:
        raise BadInput(f"{what}: {method.together}: leave sequential out, or choose options that decide layer by layer")
    if not relayable(type(model)):
        raise BadInput(
            f"{what}: decoder layers of {type(model).__name__} share more than hidden states, so it cannot go layer by layer"
        )


class Walk:
    """One way through the decoder: for i = 0, 1, ... `measure(i)`, `go_on(i, ...)`, and `leave(i)` once block i is written.

    It has a skeleton of its own, in which blocks take the shapes that they were changed to.
    """

    def __init__(self, path: str | Path, reader: Reader, text: Text, tiers: Iterable[str], **how: Any) -> None:
        """Raises BadInput for a model without a tokenizer, and for no text."""
        self.checkpoint, self.text, self.tiers = Checkpoint(path, reader, **how), text, parse(sorted({"R0", *tiers} - {"D"}))
        model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        if tokenizer is None:
            raise BadInput(f"{path} has no tokenizer: calibration reads text; put its tokenizer files beside config.json")
        self.by_domain = text.by_domain
        if self.by_domain and "C" in self.tiers:
            raise BadInput("tier C keeps tokens one by one, not by domain: calibrate on one domain, or on all")
        length = corpus.context_of(model.config, text.context)
        self.found = list(corpus.pieces(text.documents, tokenizer, length))
        if not self.found:
            raise BadInput("there is no text to calibrate on")
        self.tokens = sum(len(piece.ids) for piece in self.found)
        self.size, self.pad = corpus.batch_size(model, length), tokenizer.pad_token_id or 0
        self.header = CalibrationHeader(
            describe(self.checkpoint.view, tokenizer).layers,
            self.tiers,
            sources=(text.source,) if text.source else (),
            domains=tuple(dict.fromkeys(piece.domain for piece in self.found)) if self.by_domain else (),
            progress={"tokens": self.tokens, "complete": True},
        )
        self.pages = Pages(self.checkpoint)

    @property
    def hash(self) -> str:
        """Of the text as the model reads it."""
        hashed = hashlib.sha256(str(self.size).encode())
        for piece in self.found:
            hashed.update(f"\n{piece.domain}\n".encode() + array("q", piece.ids).tobytes())
        return hashed.hexdigest()[:16]

    @property
    def disk_bytes(self) -> int:
        """Of hidden states, twice, and of a layer's features."""
        width = max(facts.width for facts in self.checkpoint.facts)
        return self.tokens * width * (2 * self.checkpoint.model.dtype.itemsize + (8 if "C" in self.tiers else 0))

    def begin(self, partial: Path, first: int) -> None:
        """Work within the folder `partial`, from block `first` on. Raises BadInput where what should lie there is gone."""
        self.folder = partial / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.relay = Relay(self.checkpoint.view, [[i] for i in range(len(self.checkpoint.view))], self.folder / "relay")
        if 0 < first < len(self.checkpoint.view) and not self.relay.usable(first):
            raise BadInput(f"{self.folder} lacks the hidden states that enter block {first}: delete {partial} and begin again")

    def measure(self, i: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Calibration:
        """Block i's statistics, with the blocks before it as they were changed; they replace those of the block before."""
        with ExitStack() as stack:
            stack.enter_context(self.pages.group(self.relay, i))
            stack.enter_context(self.relay.group(i))
            features = stack.enter_context((self.folder / FEATURES).open("wb")) if "C" in self.tiers else None
            collector = Collector(
                self.checkpoint.view,
                self.tiers,
                [i],
                by_domain=self.by_domain,
                every=self.text.every,
                features=features,
                stop=True,
            )
            stack.enter_context(collector)
            self._read(collector, lambda done: progress(2 * i * self.tokens + done, self._total))
        save_state(self.folder, self.header, f"state-{i}", {i: collector.sums[i]})
        return Calibration(self.folder, self.header)

    def go_on(
        self, i: int, change: Change, made: dict[str, Tensor], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Run block i's decoder layer with the tensors `made` of its `change`; what leaves it enters the next one."""
        if i + 1 == len(self.checkpoint.view):
            return
        block = self.checkpoint.view[i]
        apply(block, change, self.checkpoint.facts[i])  # without memory: shapes, counts and forms
        with self.pages.group(self.relay, i, made), self.relay.group(i):
            self._read(None, lambda done: progress((2 * i + 1) * self.tokens + done, self._total))
        block.experts.to("meta")  # factors came with the change

    @property
    def _total(self) -> int:
        """Tokens of all passes: behind the last block nothing runs again."""
        return (2 * len(self.checkpoint.view) - 1) * self.tokens

    def leave(self, i: int) -> None:
        """What entered block i is not needed any more."""
        self.relay.drop(i)

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, collector: Collector | None, progress: Callable[[int], None]) -> None:
        done = 0

        def before(batch: corpus.Batch) -> None:
            if collector is not None:
                collector.domains = batch.domains
            self.relay.batch(batch.pieces)

        def after(batch: corpus.Batch) -> None:
            nonlocal done
            if collector is not None:
                collector.end_batch()
            done += int(batch.mask_BN.sum())
            progress(done)

        def run(model: Any, ids_BN: Tensor, mask_BN: Tensor) -> None:
            try:
                corpus.forward(model, ids_BN, mask_BN)
            except (Enough, Stop):
                return

        corpus.read(self.checkpoint.model, self.found, size=self.size, pad=self.pad, before=before, after=after, run=run)
