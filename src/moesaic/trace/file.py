"""A routing trace: which experts every token chose at every layer, memory-mapped, with what is needed to read it right.

Rows are tokens, sequence by sequence; a row holds the choices of all layers. Shape legend: T tokens (rows), L layers,
K slots, E experts (the most of any layer), S sequences, N runs, M experts looked ahead at, A layers looked ahead.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace import segments

VERSION = 1
KEY = "moetrace"
"""Where a blob's metadata says that it is a trace."""

RUN_COLUMNS = ("sequence", "first_step", "tokens", "tokens_per_step")


class TraceLayer(NamedTuple):
    """One MoE layer: its name in the model, routed experts, slots, bytes of one expert, and whose tokens it sees."""

    name: str
    experts: int
    top_k: int
    expert_bytes: int = 0
    stream: str = ""


@dataclass(frozen=True)
class Header:
    """What a trace is of. Two traces can be joined, or a trace and a model compared, when their `layers` agree."""

    layers: tuple[TraceLayer, ...]
    model: str = ""
    architecture: str = ""
    tokenizer: str = ""
    """Fingerprint of the vocabulary, "" where none was given."""
    source: str = ""
    domains: tuple[str, ...] = ()
    resident_bytes: int = 0
    """Bytes of the model outside its routed experts."""
    extra: dict[str, Any] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        """As a blob's metadata, whose values are strings."""
        return {KEY: json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False)}

    @staticmethod
    def parse(metadata: dict[str, str], where: str) -> Header:
        """Raises BadInput naming `where` for something that is no trace, or of a version to come."""
        if KEY not in metadata:
            raise BadInput(f"{where} is a safetensors file, but no routing trace: record one with `moesaic trace`")
        try:
            values = json.loads(metadata[KEY])
            version = int(values.pop("version"))
            if version > VERSION:
                raise BadInput(f"{where} has trace format {version}; this moesaic reads up to {VERSION}: upgrade moesaic")
            layers = tuple(TraceLayer(*layer) for layer in values.pop("layers"))
            if not layers:
                raise BadInput(f"{where}: a trace of no layers")
            return Header(layers, domains=tuple(values.pop("domains")), **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{where}: broken trace header ({error})") from error


def id_dtype(experts: int) -> np.dtype:
    """Smallest type for ids of that many experts and one value for an empty slot, its largest."""
    return np.dtype(np.uint8 if experts <= 255 else np.uint16)


class Trace:
    """The rows of one file or array set.

    Attributes:
        experts_TLK: ids, uint8 or uint16; `empty` (the type's largest value) where a slot holds none.
        weights_TLK: float16 weights as the experts' outputs were multiplied, or None.
        logits_TLE: float16 raw router scores, or None.
        ahead_TLAM: ids that the routers of layers l+1..l+A would choose from layer l's router input, best first, or None.
        tokens_T: token ids, or None.
        runs_N4: (sequence, first step, tokens, tokens per step): one forward pass is a step; prefill is a run with all its
            tokens in one step, decoding a run with one token per step.
        domain_S: index into `header.domains` of each sequence, -1 = none. `stream_S`: index into `streams`.
        hidden_HLD, hidden_rows_H: sampled router inputs (float16) and their rows, or None.
    """

    def __init__(self, header: Header, columns: segments.Columns, path: Path | None = None, lost_bytes: int = 0) -> None:
        self.header, self.columns, self.path, self.lost_bytes = header, columns, path, lost_bytes
        for name in ("experts", "runs", "sequences"):
            if name not in columns:
                raise BadInput(f"{path or 'trace'} has no column {name!r}: it is broken, record it again")
        self.experts_TLK = columns["experts"]
        self.weights_TLK = columns.get("weights")
        self.logits_TLE = columns.get("logits")
        self.ahead_TLAM = columns.get("ahead")
        self.tokens_T = columns.get("tokens")
        self.hidden_HLD, self.hidden_rows_H = columns.get("hidden"), columns.get("hidden_rows")
        self.runs_N4 = np.asarray(columns["runs"], np.int64)
        self.domain_S = np.asarray(columns["sequences"][:, 0], np.int64)
        self.stream_S = np.asarray(columns["sequences"][:, 1], np.int64)
        shape = self.experts_TLK.shape
        if len(shape) != 3 or shape[1] != len(header.layers) or int(self.runs_N4[:, 2].sum()) != shape[0]:
            raise BadInput(f"{path or 'trace'}: choices {list(shape)} do not fit its header and runs: record it again")

    def __len__(self) -> int:
        return self.experts_TLK.shape[0]

    def __repr__(self) -> str:
        return f"Trace({self.name}: {len(self):,} tokens, {len(self.layers)} layers, {len(self.starts_S1) - 1:,} sequences)"

    @property
    def name(self) -> str:
        return str(self.path) if self.path else self.header.model or "trace"

    @property
    def layers(self) -> tuple[TraceLayer, ...]:
        return self.header.layers

    @property
    def top_k(self) -> int:
        """Slots per token and layer, K (the most of any layer)."""
        return self.experts_TLK.shape[2]

    @property
    def num_experts(self) -> int:
        """E, the most of any layer."""
        return max(layer.experts for layer in self.layers)

    @property
    def experts_L(self) -> np.ndarray:
        return np.array([layer.experts for layer in self.layers])

    @property
    def bytes_L(self) -> np.ndarray:
        """Bytes of one expert of each layer."""
        return np.array([layer.expert_bytes for layer in self.layers], np.int64)

    @property
    def empty(self) -> int:
        """The id of an empty slot."""
        return int(np.iinfo(self.experts_TLK.dtype).max)

    @property
    def domains(self) -> tuple[str, ...]:
        return self.header.domains

    @property
    def streams(self) -> tuple[str, ...]:
        """Groups of layers that see the same tokens: one, or two for an encoder and a decoder."""
        return tuple(dict.fromkeys(layer.stream for layer in self.layers))

    @cached_property
    def starts_S1(self) -> np.ndarray:
        """First row of each sequence, and the number of rows."""
        sizes = np.bincount(self.runs_N4[:, 0], self.runs_N4[:, 2], minlength=len(self.domain_S)).astype(np.int64)
        return np.concatenate([[0], np.cumsum(sizes)])

    @property
    def lengths_S(self) -> np.ndarray:
        return np.diff(self.starts_S1)

    @cached_property
    def sequence_T(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.domain_S), dtype=np.int32), self.lengths_S)

    @cached_property
    def position_T(self) -> np.ndarray:
        """Index of each token in its sequence, padding not counted."""
        return np.arange(len(self), dtype=np.int64) - np.repeat(self.starts_S1[:-1], self.lengths_S)

    @cached_property
    def step_T(self) -> np.ndarray:
        """Forward pass in which each token was routed."""
        _, first_N, tokens_N, each_N = self.runs_N4.T
        within_T = np.arange(len(self)) - np.repeat(np.cumsum(tokens_N) - tokens_N, tokens_N)
        return np.repeat(first_N, tokens_N) + within_T // np.repeat(each_N, tokens_N)

    @property
    def domain_T(self) -> np.ndarray:
        return self.domain_S[self.sequence_T]

    @cached_property
    def choices(self) -> int:
        """Filled slots of all layers."""
        return sum(int((block != self.empty).sum()) for _, block in self.blocks())

    def blocks(self, tokens: int = 1 << 16) -> Iterator[tuple[slice, np.ndarray]]:
        """Row ranges and their choices [t, L, K], a block at a time, so that a mapped file never has to fit in memory."""
        for start in range(0, len(self), tokens):
            rows = slice(start, min(len(self), start + tokens))
            yield rows, np.asarray(self.experts_TLK[rows])

    def in_time(self) -> np.ndarray:
        """Rows in the order in which they were routed: by step, then by sequence."""
        return np.argsort(self.step_T, kind="stable")

    def check(self) -> Trace:
        """Raises BadInput when an id is not an expert of its layer, or the trace is empty."""
        if not len(self):
            raise BadInput(f"{self.name} holds no tokens: nothing was recorded")
        for rows, block in self.blocks():
            worst_L = np.where(block == self.empty, 0, block).max(axis=(0, 2))
            bad = np.flatnonzero(worst_L >= self.experts_L)
            if len(bad):
                layer = self.layers[bad[0]]
                raise BadInput(
                    f"{self.name}: row {rows.start}+ has expert {worst_L[bad[0]]} at {layer.name}, which has "
                    f"{layer.experts}: the file is broken"
                )
        return self


def open_trace(path: str | Path) -> Trace:
    """Open a trace by memory map; of a killed capture, all that it had flushed. Raises BadInput for anything else."""
    from moesaic.trace.join import joined

    path = Path(path).expanduser()
    if not path.is_file():
        raise BadInput(f"no such trace: {path}" if not path.exists() else f"{path} is a folder: name a .moetrace file")
    found, lost = segments.read(path)
    if not found:
        raise BadInput(f"{path} is empty: nothing was recorded in it")
    headers = [Header.parse(segment.metadata, str(path)) for segment in found]
    if len(found) == 1 and "written" not in found[0].columns:
        return Trace(headers[0], found[0].columns, path, lost)
    return Trace(headers[-1], joined([segment.columns for segment in found]), path, lost)


def from_arrays(
    experts_TLK: np.ndarray,
    experts: int | Sequence[int],
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    decode: bool = False,
    weights_TLK: np.ndarray | None = None,
    tokens_T: np.ndarray | None = None,
    logits_TLE: np.ndarray | None = None,
    ahead_TLAM: np.ndarray | None = None,
    domain_S: Sequence[int] | np.ndarray | None = None,
    domains: Sequence[str] = (),
    expert_bytes: int = 0,
    header: Header | None = None,
) -> Trace:
    """A trace from plain arrays; ids below 0 are empty slots.

    `lengths` are the rows of each sequence (default: one sequence). `decode`: one step per token, else one per sequence.
    Raises BadInput where shapes or ids do not fit.
    """
    experts_TLK = np.asarray(experts_TLK)
    if experts_TLK.ndim != 3:
        raise BadInput(f"choices must be [tokens, layers, slots], given {list(experts_TLK.shape)}")
    tokens, layers, slots = experts_TLK.shape
    experts_L = [experts] * layers if isinstance(experts, int) else list(experts)
    if header is None:
        rows = tuple(TraceLayer(f"layers.{i}", int(e), slots, expert_bytes) for i, e in enumerate(experts_L))
        header = Header(rows, domains=tuple(domains))
    dtype = id_dtype(max(experts_L))
    ids = np.where(experts_TLK < 0, np.iinfo(dtype).max, experts_TLK).astype(dtype)
    sizes = np.asarray([tokens] if lengths is None else lengths, np.int64)
    if sizes.sum() != tokens:
        raise BadInput(f"sequence lengths add up to {sizes.sum()}, but there are {tokens} tokens")
    each = np.ones_like(sizes) if decode else np.maximum(sizes, 1)
    first = np.cumsum(np.concatenate([[0], sizes if decode else np.ones_like(sizes)]))[:-1]
    columns: segments.Columns = {"experts": ids, "runs": np.stack([np.arange(len(sizes)), first, sizes, each], 1)}
    domain = np.full(len(sizes), -1) if domain_S is None else np.asarray(domain_S)
    columns["sequences"] = np.stack([domain, np.zeros_like(domain)], 1).astype(np.int32)
    given: list[tuple[str, Any, Any]] = [
        ("weights", weights_TLK, np.float16), ("logits", logits_TLE, np.float16),
        ("ahead", ahead_TLAM, dtype), ("tokens", tokens_T, np.uint32),
    ]  # fmt: skip
    columns |= {name: np.asarray(array, kind) for name, array, kind in given if array is not None}
    for name in ("weights", "logits", "ahead", "tokens"):
        if name in columns and len(columns[name]) != tokens:
            raise BadInput(f"{name} has {len(columns[name])} rows for {tokens} tokens")
    return Trace(header, columns).check()
