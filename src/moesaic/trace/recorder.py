"""Record the routing of a model while it runs: hooks that only look, one small copy per forward pass.

Shape legend: T tokens, L layers, K slots, E experts, B rows of a batch, N tokens per row, A layers looked ahead,
M experts per layer looked ahead at, H sampled tokens, D model width.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moesaic import __version__
from moesaic.core.errors import BadInput
from moesaic.core.recompute import recomputing
from moesaic.trace import calls
from moesaic.trace.file import Header, Trace, TraceLayer
from moesaic.trace.lookahead import look_ahead
from moesaic.trace.rows import Passed, Rows, widened
from moesaic.trace.writer import Writer
from moesaic.view import View, view
from moesaic.view.block import Block
from moesaic.view.tap import Choice

QUEUED_TOKENS, QUEUED_PASSES = 1 << 14, 256
"""Finished passes wait until there are so many tokens or passes: one copy from the device for all."""


class _Seen(NamedTuple):
    """What one layer did in the pass under way."""

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None
    ahead_TAM: Tensor | None
    hidden_HD: Tensor | None


class _Pass:
    """One forward pass under way in one thread: what is known of the call, and what each layer did so far."""

    def __init__(self, call: calls.Call | None, step: int) -> None:
        self.call, self.step = call, step
        self.seen: dict[int, _Seen] = {}
        self.sampled: dict[int, Tensor] = {}
        self.numbers: dict[str, range] = {}


class Recorder:
    """Records while inside `with`; then `trace` is the opened result. See `moesaic.trace` for the arguments.

    Attributes:
        domain: domain of the sequences that begin from now on: a name, one name per row of the batch, or None.
        tokens: tokens recorded so far. `seconds`: time spent recording. `result`: the Trace, once closed.
    """

    def __init__(
        self,
        model: Any,
        path: str | Path | None = None,
        *,
        tokenizer: Any = None,
        weights: bool = True,
        logits: bool = False,
        lookahead: int = 0,
        hidden: float = 0.0,
        domain: str | Sequence[str] | None = None,
        source: str = "",
        name: str = "",
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if not 0 <= hidden <= 1:
            raise BadInput(f"hidden={hidden}: the share of tokens whose hidden states are kept, from 0 to 1")
        self.view: View = view(model)
        self.model = self.view.model
        if lookahead and not 0 < lookahead < len(self.view):
            raise BadInput(
                f"lookahead={lookahead}: this model has {len(self.view)} MoE layers; look 1 to {len(self.view) - 1} on"
            )
        self.keep_weights, self.keep_logits, self.lookahead, self.hidden = weights, logits, lookahead, hidden
        self.domain, self.seconds = domain, 0.0
        self.result: Trace | None = None
        self.header = describe(self.view, tokenizer, source, name)
        layers = self.header.layers
        self.streams = tuple(dict.fromkeys(layer.stream for layer in layers))
        self._layers_of = {s: [i for i, layer in enumerate(layers) if layer.stream == s] for s in self.streams}
        experts_L = np.array([layer.experts for layer in layers])
        self._slots = max(layer.top_k for layer in layers)
        self._ahead = min(2 * self._slots, int(experts_L.min()))
        kept = {"weights": weights, "logits": logits, "ahead": lookahead > 0, "hidden": hidden > 0}
        config: Any = self.model.config
        vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1 << 20
        self._rows = Rows(experts_L, self._slots, vocabulary, {name for name, keep in kept.items() if keep})
        # torch has little arithmetic for unsigned 16-bit ids; -1 has the same bits as the empty slot in either type
        self._torch_dtype = torch.uint8 if self._rows.dtype == np.uint8 else torch.int16
        self._pad = _padding_id(self.model)
        self.writer = Writer(self.header, path, overwrite=overwrite, resume=resume)
        self._check_resumed()
        held = self.writer.resumed
        self._sequences = calls.Sequences(len(held.domain_S) if held else 0)
        self._step = int(held.step_T.max()) + 1 if held else 0
        self._queue: list[Passed] = []
        self._queued = 0
        self._here = threading.local()
        self._lock = threading.Lock()
        self._hooks = ExitStack()
        self._random = torch.Generator().manual_seed(0)

    @property
    def tokens(self) -> int:
        return self.writer.tokens + self._queued

    def __enter__(self) -> Recorder:
        self.attach()
        return self

    def attach(self) -> None:
        """Watch the model, from now on or again."""
        self._hooks.enter_context(calls.watch_calls(self.model, self._before, self._after))
        for i, block in enumerate(self.view):
            self._hooks.enter_context(block.on_choice(self._watcher(i), scores=self.keep_logits))

    def detach(self) -> None:
        """Leave the model alone until `attach`; the file stays open."""
        self._hooks.close()

    def __exit__(self, failed: object, *_: object) -> None:
        self.detach()
        if failed is not None:  # a pass that was cut short has no choices for its last layers
            self._here.current = None
        self.close()

    def close(self) -> Trace | None:
        """Write what is still in memory; the file is complete afterwards."""
        if self.result is None:
            self._finish()
            self.flush()
            self.result = self.writer.close()
        return self.result

    # One forward pass -------------------------------------------------------------------------------------------

    def _before(self, call: calls.Call) -> None:
        self._finish()  # a pass that never ended, or blocks that were run outside of the model
        self._here.current = _Pass(call, -1)

    def _after(self, output: Any) -> None:
        current = getattr(self._here, "current", None)
        if output is None:  # the pass failed
            self._here.current = None
            return
        self._finish()
        if current is None or current.call is None:
            return
        cache = getattr(output, "past_key_values", None)
        cache = current.call.cache if cache is None else cache
        if cache is not None:
            for stream, numbers in current.numbers.items():
                self._sequences.keep(cache, stream, numbers)

    def _watcher(self, i: int) -> Any:
        def watch(choice: Choice, block: Block) -> None:
            began = time.perf_counter()
            self._see(i, choice, block)
            self.seconds += time.perf_counter() - began

        return watch

    def _see(self, i: int, choice: Choice, block: Block) -> None:
        if recomputing():
            return
        current = getattr(self._here, "current", None)
        if current is not None and i in current.seen:  # a layer that runs twice in a pass: the second time is a pass of its own
            call = current.call
            self._finish()
            current = self._here.current = _Pass(call, -1)
        elif current is None:
            current = self._here.current = _Pass(None, -1)
        ids_TK = choice.ids.detach()
        if ids_TK.dim() != 2:
            ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
        tokens = ids_TK.shape[0]
        logits_TE = ahead_TAM = hidden_HD = None
        if self.keep_logits:
            logits_TE = block.logits(choice)
            logits_TE = None if logits_TE is None or logits_TE.shape[0] != tokens else logits_TE.detach().half()
        if self.lookahead:
            ahead_TAM = self._look_ahead(i, choice.x.detach())
        if self.hidden:
            if tokens not in current.sampled:
                current.sampled[tokens] = torch.nonzero(torch.rand(tokens, generator=self._random) < self.hidden).flatten()
            rows_H = current.sampled[tokens].to(choice.x.device)
            hidden_HD = choice.x.detach().reshape(tokens, -1)[rows_H].half()
        current.seen[i] = _Seen(ids_TK, choice.weights.detach().reshape(ids_TK.shape), logits_TE, ahead_TAM, hidden_HD)

    def _look_ahead(self, i: int, x: Tensor) -> Tensor:
        """What the next layers' routers choose for this layer's router input: their choice first, then by score."""
        coming = self.view[i + 1 : i + 1 + self.lookahead]
        tokens = x.numel() // x.shape[-1]
        found = [look_ahead(coming, x, self._ahead)] if coming else []
        missing = self.lookahead - len(coming)
        found += [torch.full((tokens, missing, self._ahead), -1, device=x.device)]
        return torch.cat(found, 1).to(self._torch_dtype)

    def _finish(self) -> None:
        """The pass under way is over: queue what it did, stream by stream."""
        current = getattr(self._here, "current", None)
        if current is None:
            return
        self._here.current = None
        if not current.seen:
            return
        began = time.perf_counter()
        with self._lock:
            current.step, self._step = self._step, self._step + 1
            for stream in self.streams:
                layers = [i for i in self._layers_of[stream] if i in current.seen]
                sizes = dict.fromkeys(current.seen[i].ids_TK.shape[0] for i in layers)
                for tokens in sizes:  # layers that see other tokens (a tower, pooled positions) are rows of their own
                    self._queue_rows(current, stream, [i for i in layers if current.seen[i].ids_TK.shape[0] == tokens], tokens)
            if self._queued >= QUEUED_TOKENS or self.writer.due or len(self._queue) >= QUEUED_PASSES:
                self._drain()
                if self.writer.due:
                    self.writer.flush()
        self.seconds += time.perf_counter() - began

    def _queue_rows(self, current: _Pass, stream: str, layers: list[int], tokens: int) -> None:
        seen = [current.seen[i] for i in layers]
        call = current.call
        if call is not None:
            call = call.part(call.decoder_tokens_BN is not None and "decoder" in stream)
        shaped = call is not None and call.tokens_BN is not None and call.tokens_BN.numel() == tokens
        call = call if shaped else None
        numbers, new = self._number(current, call, stream, tokens)
        count, device = len(self.header.layers), seen[0].ids_TK.device

        def column(parts: Sequence[Tensor | None], empty: float) -> Tensor | None:
            some = next((part for part in parts if part is not None), None)
            if some is None:
                return None
            widest = max(part.shape[-1] for part in parts if part is not None)
            blank = some.new_full((*some.shape[:-1], widest), empty)
            by_layer = dict(zip(layers, parts, strict=True))
            filled = (by_layer.get(i) for i in range(count))
            return torch.stack([blank if part is None else widened(part, widest, empty) for part in filled])

        ids_LTK = torch.stack([widened(one.ids_TK, self._slots, -1) for one in seen]).to(self._torch_dtype)
        weights_LTK = None
        if self.keep_weights:
            weights_LTK = torch.stack([widened(one.weights_TK, self._slots, 0) for one in seen]).half()
        if len(layers) < count:
            ids_LTK = torch.full((count, *ids_LTK.shape[1:]), -1, device=device).to(self._torch_dtype).index_copy_(
                0, torch.tensor(layers, device=device), ids_LTK
            )  # fmt: skip
            weights_LTK = column(list(weights_LTK), 0) if weights_LTK is not None else None

        self._queue.append(
            Passed(
                ids_LTK,
                weights_LTK,
                column([one.logits_TE for one in seen], float("-inf")) if self.keep_logits else None,
                column([one.ahead_TAM for one in seen], -1) if self.lookahead else None,
                column([one.hidden_HD for one in seen], 0) if self.hidden else None,
                current.sampled.get(tokens),
                None if call is None else call.tokens_BN,
                None if call is None else call.mask_BN,
                None if new else self._pad,
                numbers,
                current.step,
            )
        )
        self._queued += tokens

    def _number(self, current: _Pass, call: calls.Call | None, stream: str, tokens: int) -> tuple[range | np.ndarray, bool]:
        """Sequences of a pass, one per row of the batch or one per token, and whether they begin with it."""
        number = self.streams.index(stream)
        if call is None or call.tokens_BN is None:
            one = self._sequences.new(1)
            self.writer.begin(one[0], self._domain_of(0), number)
            return one, True
        numbers, new = self._sequences.rows(call, stream, call.tokens_BN.shape[0])
        current.numbers[stream] = numbers
        if new:
            for b, n in enumerate(numbers):
                self.writer.begin(n, self._domain_of(b), number)
            if call.positions_BN is not None and call.positions_BN.shape == call.tokens_BN.shape:
                return self._split_packed(call.positions_BN, call.mask_BN, numbers, number), True
        return numbers, new

    def _split_packed(self, positions_BN: Tensor, mask_BN: Tensor | None, numbers: range, stream: int) -> range | np.ndarray:
        """Several sequences packed in one row show as positions that begin again."""
        positions = positions_BN.cpu().numpy()
        kept = np.ones(positions.shape, bool) if mask_BN is None else mask_BN.cpu().numpy() != 0
        again = np.zeros(positions.shape, bool)
        again[:, 1:] = (positions[:, 1:] <= positions[:, :-1]) & kept[:, 1:] & kept[:, :-1]
        if not again.any():
            return numbers
        sequence_BN = np.repeat(np.array(numbers)[:, None], positions.shape[1], 1)
        for b, n in np.argwhere(again):
            number = self._sequences.new(1)[0]
            self.writer.begin(number, self._domain_of(int(b)), stream)
            sequence_BN[b, n:] = number
        return sequence_BN.reshape(-1)

    def _domain_of(self, row: int) -> int:
        if self.domain is None or isinstance(self.domain, str):
            return self.writer.domain(self.domain)
        if row >= len(self.domain):
            raise BadInput(f"domain names {len(self.domain)} rows, the batch has more: give one name, or one per row")
        return self.writer.domain(self.domain[row])

    # From the queue to the file ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what was recorded so far: it survives a kill."""
        with self._lock:
            self._drain()
            self.writer.flush()

    def _drain(self) -> None:
        queue, self._queue, self._queued = self._queue, [], 0
        if queue:
            self.writer.add(*self._rows.of(queue))

    def _check_resumed(self) -> None:
        if self.writer.resumed is None:
            return
        kept = {"experts", "tokens", *self._rows.kept} | ({"hidden_rows"} if self.hidden else set())
        if kept != self.writer.columns:
            columns = ", ".join(sorted(self.writer.columns))
            raise BadInput(f"{self.writer.path} holds {columns}: resume it with the same options")


def _padding_id(model: Any) -> int | None:
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        value = getattr(config, "pad_token_id", None)
        if isinstance(value, int) and value >= 0:
            return value
    return None


def fingerprint(tokenizer: Any) -> str:
    """Short hash of a tokenizer's vocabulary, "" without one: traces and texts of different ones must not be mixed."""
    if tokenizer is None:
        return ""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _stream_of(name: str) -> str:
    """Layers of one stack see the same tokens: the name up to the first number."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", name)[0]


def describe(blocks: View, tokenizer: Any = None, source: str = "", name: str = "") -> Header:
    """The header of a trace of this model."""
    layers = tuple(TraceLayer(b.name, b.num_experts, b.top_k, b.expert_bytes, _stream_of(b.name)) for b in blocks)
    facts = blocks.summary()
    config: Any = blocks.model.config
    return Header(
        layers,
        model=name or str(getattr(config, "_name_or_path", "") or ""),
        architecture=facts["architecture"],
        tokenizer=fingerprint(tokenizer),
        source=source,
        resident_bytes=int(facts["total_bytes"] - facts["expert_bytes"]),
        extra={"moesaic": __version__, "dtype": str(blocks.model.dtype).removeprefix("torch.")},
    )
