"""`calibrate`: a text through a model once, with every statistic asked for; saved as it goes, resumed where it stopped.

Where the statistics of all layers do not fit in memory, layers are taken in groups, each of which goes on from the hidden
states that the group before left on disk (relay.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.trace import corpus
from moesaic.trace.calibration import tiers as tier
from moesaic.trace.calibration.backward import Backward
from moesaic.trace.calibration.collect import Collector, Enough
from moesaic.trace.calibration.relay import Relay, Stop
from moesaic.trace.calibration.store import (
    FEATURES,
    Calibration,
    CalibrationHeader,
    Statistics,
    added,
    open_calibration,
    read_header,
    save_state,
)
from moesaic.trace.recorder import Recorder, describe
from moesaic.trace.writer import check_place
from moesaic.view import Loaded, View, view

SAVE_SECONDS = 60.0

Pages = Callable[[Relay, int], AbstractContextManager[None]]
"""pages(relay, group): the group's weights are in memory inside."""


def calibrate(
    model: Any,
    documents: Iterable[Document],
    out: str | Path,
    *,
    tokenizer: Any = None,
    tiers: str | tuple[str, ...] = "R0,R1",
    by_domain: bool = False,
    context: int | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    layers_at_once: int | None = None,
    every: int = 1,
    shard: tuple[int, int] = (0, 1),
    trace: str | Path | None = None,
    trace_options: dict[str, Any] | None = None,
    source: str = "",
    name: str = "",
    resume: bool = False,
    save_seconds: float = SAVE_SECONDS,
    pages: Pages | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Collect the statistics of `tiers` over documents into the folder `out`.

    Args:
        model: a transformers MoE, or what `moesaic.load` gave (with its tokenizer).
        tiers: R0 (router), R1 (routed outputs), R2 (second moments), A1 (all experts on all tokens), C (features), B
            (gradients); surgery-and-steering.md, section A.
        by_domain: keep every statistic apart for each domain of the documents (tier D).
        context, batch_size: tokens per piece of text and pieces per pass.
        memory: bytes that the statistics may take; `layers_at_once` says it in layers. Fewer layers mean more passes.
        every: tier A1 on one token in so many.
        shard: (i, n): this run takes every n-th piece from i on; `merge` adds the shards.
        trace: also record a `.moetrace` in the same pass, with `trace_options` of `moesaic.trace`.
        resume: go on from the last state in `out`.
        pages: brings the weights of a model that is not in memory, some layers at a time.

    Raises BadInput, with nothing written, for options that do not fit.
    """
    if isinstance(model, Loaded):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise BadInput("calibrate needs the model's tokenizer: pass tokenizer=, or what moesaic.load gave")
    blocks, wanted, out = view(model), tier.parse(tiers), Path(out)
    length = corpus.context_of(model.config, context)
    if not 0 <= shard[0] < shard[1]:
        raise BadInput(f"--shard {shard[0]}/{shard[1]}: the first counts from 0 to {shard[1] - 1}")
    if every < 1:
        raise BadInput(f"every {every}: tier A1 takes one token in 1 or more")
    if by_domain and "C" in wanted:
        raise BadInput("tier C keeps tokens one by one, not by domain: calibrate it in a run of its own")
    found = list(corpus.pieces(documents, tokenizer, length))[shard[0] :: shard[1]]
    if not found:
        raise BadInput("there is no text to calibrate on" + (f" in shard {shard[0]}/{shard[1]}" if shard[1] > 1 else ""))
    groups = grouped(blocks, wanted, memory, layers_at_once)
    if pages is not None and trace is not None:
        raise BadInput("a trace is recorded with the whole model in memory: load it, or leave the trace out")
    facts = describe(blocks, tokenizer, source, name)
    settings = {"context": length, "pieces": len(found), "shard": list(shard), "groups": len(groups), "every": every}
    header = CalibrationHeader(
        facts.layers,
        wanted,
        facts.model,
        facts.tokenizer,
        (source,) if source else (),
        tuple(dict.fromkeys(piece.domain for piece in found)) if by_domain else (),
        progress={**settings, "group": 0, "pieces_done": 0, "tokens": 0, "complete": False},
    )
    if trace is not None:
        check_place(Path(trace), may_exist=resume)
    header = _place(out, header, resume)
    size = batch_size or corpus.batch_size(model, length)
    options = trace_options or {}
    _Run(
        blocks, header, out, groups, found, size, tokenizer, by_domain, every, trace, options, progress, save_seconds, pages
    ).go()  # fmt: skip
    return open_calibration(out)


def grouped(blocks: View, tiers: tuple[str, ...], memory: int | None, layers_at_once: int | None) -> list[list[int]]:
    """Layers that are collected together."""
    most = len(blocks) if layers_at_once is None else layers_at_once
    if memory is not None:
        need = max(tier.bytes_per_layer(block, tiers) for block in blocks)
        if need > memory:
            raise BadInput(f"--memory: one layer's statistics take {need:,} bytes, more than the {memory:,} allowed")
        most = min(most, memory // need)
    if most < 1:
        raise BadInput(f"layers_at_once {layers_at_once}: at least one layer is collected at a time")
    return [list(range(start, min(start + most, len(blocks)))) for start in range(0, len(blocks), most)]


def _place(out: Path, header: CalibrationHeader, resume: bool) -> CalibrationHeader:
    """The folder to write into, and the header to go on from."""
    if not out.exists():
        if not out.parent.is_dir():
            raise BadInput(f"cannot write {out}: there is no folder {out.parent}")
        out.mkdir()
        header.write(out)
        return header
    if not resume:
        raise BadInput(f"{out} exists: name another folder, or resume it")
    held = read_header(out)
    for what in ("layers", "tokenizer", "tiers", "domains"):
        if getattr(held, what) != getattr(header, what):
            raise BadInput(f"{out} was begun with other {what}: resume it with the same model and options")
    for what in ("context", "pieces", "shard", "groups", "every"):
        if held.progress.get(what) != header.progress[what]:
            begun, now = held.progress.get(what), header.progress[what]
            raise BadInput(f"{out} was begun with {what} {begun}, not {now}: resume it alike")
    if held.progress["complete"]:
        raise BadInput(f"{out} is complete: there is nothing to resume")
    return held


@dataclass
class _Run:
    """The passes of one calibration. `header.progress` always says what the state it names holds."""

    blocks: View
    header: CalibrationHeader
    out: Path
    groups: list[list[int]]
    found: list[corpus.Piece]
    size: int
    tokenizer: Any
    by_domain: bool
    every: int
    trace: str | Path | None
    trace_options: dict[str, Any]
    progress: Callable[[int, int], None]
    save_seconds: float
    pages: Pages | None = None

    def __post_init__(self) -> None:
        self.tokens = sum(len(piece.ids) for piece in self.found)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        self.relay = Relay(self.blocks, self.groups, self.out / "relay")

    def go(self) -> None:
        done = self.header.progress
        forward = [name for name in self.header.tiers if name != "B"]
        for number in range(int(done["group"]), len(self.groups)):
            layers = self.groups[number]
            sums = self._held(layers) if done["pieces_done"] else {layer: {} for layer in layers}
            if "B" in self.header.tiers and self.pages is not None:
                raise BadInput("tier B needs a backward pass through the whole model in memory: load it")
            if "B" in self.header.tiers and not done["pieces_done"]:  # before any hook is on: its passes are not to be counted
                self._backward(layers, sums)
            with ExitStack() as stack:
                last = number == len(self.groups) - 1
                if self.pages is not None:
                    stack.enter_context(self.pages(self.relay, number))
                recorder = self._recorder(stack) if last and self.trace is not None else None
                features = self._features(stack) if "C" in forward else None
                if forward:
                    self._forward(number, layers, sums, forward, recorder, features, stack)
                done |= {"group": number + 1, "pieces_done": 0, "complete": last}
                done["tokens"] = self.tokens
                self._save(f"state-{number + 1}-0", sums)
                self.relay.drop(number)
        self.relay.close()

    def _held(self, layers: list[int]) -> dict[int, dict[str, Statistics]]:
        held = Calibration(self.out, self.header)
        return {layer: held.statistics(layer) for layer in layers}

    def _recorder(self, stack: ExitStack) -> Recorder:
        options = dict(self.trace_options)
        kept = self.header.progress.get("trace_bytes")
        if kept is not None and self.trace is not None:
            os.truncate(self.trace, kept)  # what was flushed after the last state would be recorded twice
            options["resume"] = True
        elif self.header.progress["group"] or self.header.progress["pieces_done"]:
            options["overwrite"] = True
        recorder = Recorder(self.blocks.model, self.trace, tokenizer=self.tokenizer, **options)
        return stack.enter_context(recorder)

    def _features(self, stack: ExitStack) -> Any:
        path = self.out / FEATURES
        kept = int(self.header.progress.get("feature_bytes", 0))
        stream = stack.enter_context(path.open("ab" if kept else "wb"))
        stream.truncate(kept)
        return stream

    def _forward(self, number, layers, sums, tiers, recorder, features, stack) -> None:
        done, first = self.header.progress, int(self.header.progress["pieces_done"])

        def run(model: Any, ids_BN: torch.Tensor, mask_BN: torch.Tensor) -> None:
            try:
                corpus.forward(model, ids_BN, mask_BN)
            except (Enough, Stop):
                return

        if recorder is None and number and self.pages is None:
            batch = next(corpus.batches(self.found, self.size, self.pad))
            self.relay.batch(batch.pieces)
            device = next(self.blocks.model.parameters()).device
            ids_BN, mask_BN = batch.ids_BN.to(device), batch.mask_BN.to(device)
            self.relay.check(number, lambda: run(self.blocks.model, ids_BN, mask_BN))
        stop = recorder is None and layers[-1] < len(self.blocks) - 1 and self.relay.broken
        stop = stop or (self.pages is not None and number == len(self.groups) - 1)  # the head is not in memory
        stack.enter_context(self.relay.group(number, relayed=recorder is None))
        options = {"by_domain": self.by_domain, "every": self.every, "features": features, "stop": stop}
        collector = stack.enter_context(Collector(self.blocks, tiers, layers, **options))
        collector.sums = sums
        saved = time.monotonic()
        tokens = sum(len(piece.ids) for piece in self.found[:first])
        passes = len(self.groups)

        def before(batch: corpus.Batch) -> None:
            collector.domains = batch.domains
            self.relay.batch(batch.pieces)
            if recorder is not None:
                recorder.domain = batch.domains

        def after(batch: corpus.Batch) -> None:
            nonlocal saved, tokens
            collector.end_batch()
            tokens += int(batch.mask_BN.sum())
            done["pieces_done"] = batch.pieces
            self.progress(number * self.tokens + tokens, passes * self.tokens)
            if time.monotonic() - saved > self.save_seconds and batch.pieces < len(self.found):
                if recorder is not None:
                    recorder.flush()
                    done["trace_bytes"] = Path(str(self.trace)).stat().st_size
                if features is not None:
                    features.flush()
                    done["feature_bytes"] = features.tell()
                done["tokens"] = tokens
                self._save(f"state-{number}-{batch.pieces}", sums)
                saved = time.monotonic()

        corpus.read(
            self.blocks.model, self.found, size=self.size, pad=self.pad, first=first, before=before, after=after, run=run
        )
        if features is not None:
            features.flush()
            done["feature_bytes"] = features.tell()

    def _backward(self, layers: list[int], sums: dict[int, dict[str, Statistics]]) -> None:
        with Backward(self.blocks, layers) as backward:
            for piece in self.found:
                backward.step(torch.tensor(piece.ids))
            for layer in layers:
                sums[layer][""] = added([sums[layer].get("", {}), backward.sums[layer]])

    def _save(self, name: str, sums: dict[int, dict[str, Statistics]]) -> None:
        keep = self.out / self.header.state if self.header.state else None
        save_state(self.out, self.header, name, sums, keep)
