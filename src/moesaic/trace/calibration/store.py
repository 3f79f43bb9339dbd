"""The folder of a calibration: one safetensors file per layer, and a header that names model, text and progress.

    OUT/header.json                     what it is of, how far it went, which state holds
    OUT/state-N/layer-003.safetensors   DOMAIN/STATISTIC -> tensor
    OUT/features.moefeatures            tier C: inputs and outputs, row by row

A state is complete before the header names it: a kill leaves the last one that was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.trace import segments
from moesaic.trace.calibration.tiers import BINS, Statistics, combine
from moesaic.trace.file import TraceLayer

VERSION = 1
FEATURES = "features.moefeatures"

HASHED = 1 << 16
"""Values of a statistic that counts in a calibration's hash; larger ones are sums over the same tokens."""


@dataclass
class CalibrationHeader:
    """What a calibration is of. Two can be merged when `layers`, `tokenizer` and `tiers` agree."""

    layers: tuple[TraceLayer, ...]
    tiers: tuple[str, ...]
    model: str = ""
    tokenizer: str = ""
    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    state: str = ""
    progress: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_atomically(folder / "header.json", json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False))


def read_header(folder: str | Path) -> CalibrationHeader:
    """Raises BadInput naming the folder for anything but a calibration of a version this moesaic reads."""
    folder = Path(folder)
    try:
        values = json.loads((folder / "header.json").read_text())
        version = int(values.pop("version"))
        if version > VERSION:
            raise BadInput(f"{folder} has calibration format {version}; this moesaic reads up to {VERSION}: upgrade moesaic")
        layers = tuple(TraceLayer(*layer) for layer in values.pop("layers"))
        for name in ("tiers", "sources", "domains"):
            values[name] = tuple(values[name])
        return CalibrationHeader(layers, **values)
    except OSError as error:
        raise BadInput(f"{folder} is no calibration: {error.strerror or error}; make one with `moesaic calibrate`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: broken header.json ({error})") from error


class Calibration:
    """Statistics of every layer, read from the folder a layer at a time."""

    def __init__(self, folder: Path, header: CalibrationHeader) -> None:
        self.folder, self.header = folder, header

    def __len__(self) -> int:
        return len(self.header.layers)

    @cached_property
    def hash(self) -> str:
        """Of what it is of and what it found: the header, and of every layer all statistics but the large ones (`HASHED`)."""
        header = self.header
        hashed = sha256(json.dumps([header.layers, header.tiers, header.domains, header.progress.get("tokens")]).encode())
        for layer in range(len(self)):
            path = self.folder / header.state / f"layer-{layer:03d}.safetensors"
            try:
                with safe_open(path, "np") as stored:
                    for key in sorted(stored.keys()):
                        if prod(stored.get_slice(key).get_shape()) <= HASHED:
                            hashed.update(key.encode() + stored.get_tensor(key).tobytes())
            except (OSError, SafetensorError) as error:
                raise BadInput(f"cannot read {path}: {error}") from error
        return hashed.hexdigest()[:16]

    def statistics(self, layer: int) -> dict[str, Statistics]:
        """Domain -> statistics of a layer ("" where domains were not kept apart)."""
        path = self.folder / self.header.state / f"layer-{layer:03d}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BadInput(f"cannot read {path}: {error}") from error
        found: dict[str, Statistics] = {}
        for key, tensor in tensors.items():
            domain, _, name = key.rpartition("/")
            found.setdefault(domain, {})[name] = tensor
        return found

    def layer(self, layer: int, domain: str | None = None) -> LayerStatistics:
        """Statistics of a layer over all domains, or over one. Raises BadInput for a domain that is not there."""
        by_domain = self.statistics(layer)
        if domain is not None:
            if domain not in by_domain:
                raise BadInput(f"{self.folder} has no domain {domain!r}: it has {', '.join(filter(None, by_domain)) or 'none'}")
            return LayerStatistics(by_domain[domain])
        return LayerStatistics(added(by_domain.values()))

    def features(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Tier C: inputs and outputs of a layer, float32 [T, D] each."""
        path = self.folder / FEATURES
        if "C" not in self.header.tiers or not path.exists():
            raise BadInput(f"{self.folder} holds no features: calibrate with tier C")
        parts = [s.columns for s in segments.read(path).found if f"{layer}.input" in s.columns]
        x_TD, y_TD = (np.concatenate([part[f"{layer}.{side}"] for part in parts]) for side in ("input", "output"))
        return x_TD, y_TD


class LayerStatistics:
    """One layer's sums by name, and the means, similarities and quantiles that follow from them."""

    def __init__(self, sums: Statistics) -> None:
        self.sums = sums

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sums:
            raise BadInput(f"this calibration has no {name}: it has {', '.join(sorted(self.sums))}")
        return self.sums[name]

    def mean(self, name: str) -> Tensor:
        """The mean of a statistic over the tokens routed to each expert (over all tokens for `probability`, `all_output`)."""
        total = self[f"{name}_sum"].double()
        count = self["selection_count"]
        if name == "all_output":
            count = self["all_token_count"]
        elif name in ("probability", "logit_gram"):
            count = self["token_count"]
        count = count.clamp(min=1)
        return total / (count.reshape(-1, *[1] * (total.dim() - 1)) if count.dim() else count)

    @property
    def frequency_E(self) -> Tensor:
        """Share of tokens that chose each expert; sums to K."""
        return self["selection_count"] / self["token_count"].clamp(min=1)

    @property
    def output_variance_ED(self) -> Tensor:
        """Variance of each output value over an expert's routed tokens."""
        return (self.mean("output_square") - self.mean("output").square()).clamp(min=0)

    @property
    def logit_similarity_EE(self) -> Tensor:
        """Cosine between the logits of two experts over all tokens, from their Gram matrix."""
        gram = self["logit_gram_sum"]
        size = gram.diagonal().clamp(min=1e-300).sqrt()
        return gram / (size[:, None] * size)

    def quantile(self, name: str, q: float) -> float:
        """A quantile of `second_over_first` or `entropy` from its histogram over [0, 1]; exact to a bin's width."""
        hist = self[f"{name}_hist"]
        share = torch.cumsum(hist, 0) / hist.sum().clamp(min=1)
        bin_ = int(torch.searchsorted(share, torch.tensor(q, dtype=share.dtype)).clamp(max=BINS - 1))
        before = share[bin_ - 1].item() if bin_ else 0.0
        inside = (q - before) / max(share[bin_].item() - before, 1e-12)
        return (bin_ + min(max(inside, 0.0), 1.0)) / BINS


def added(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of several domains or shards as one."""
    total: Statistics = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = combine(name, total[name], tensor) if name in total else tensor
    return total


def open_calibration(folder: str | Path) -> Calibration:
    """Raises BadInput for a folder that is no calibration, or one that was never saved."""
    header = read_header(folder)
    if not header.state:
        raise BadInput(f"{folder}: the calibration was begun but never saved; run it again with --resume")
    return Calibration(Path(folder), header)


def save_state(
    folder: Path, header: CalibrationHeader, name: str, layers: dict[int, dict[str, Statistics]], keep: Path | None = None
) -> None:
    """Write a state under a new name, point the header at it, drop the one before. `keep` is a state to take layers from."""
    state = folder / name
    scratch = folder / f".{name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    if keep is not None:
        for path in keep.glob("layer-*.safetensors"):
            os.link(path, scratch / path.name)
    for layer, by_domain in layers.items():
        path = scratch / f"layer-{layer:03d}.safetensors"
        path.unlink(missing_ok=True)
        save_file({f"{d}/{n}": t.cpu().contiguous() for d, found in by_domain.items() for n, t in found.items()}, path)
    shutil.rmtree(state, ignore_errors=True)
    os.rename(scratch, state)
    before, header.state = header.state, name
    header.write(folder)
    if before and before != name:
        shutil.rmtree(folder / before, ignore_errors=True)


def merge(parts: Sequence[Calibration], out: str | Path) -> Calibration:
    """Shards of one calibration as one: sums and counts add, maxima stay maxima. Raises BadInput where they differ."""
    first, out = parts[0].header, Path(out)
    for part in parts[1:]:
        for what in ("layers", "tokenizer", "tiers"):
            if getattr(part.header, what) != getattr(first, what):
                raise BadInput(f"{parts[0].folder} and {part.folder} have different {what}: they cannot be merged")
    if out.exists():
        raise BadInput(f"{out} exists: name another folder")
    scratch = out.with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    header = CalibrationHeader(
        first.layers,
        first.tiers,
        first.model,
        first.tokenizer,
        tuple(dict.fromkeys(s for part in parts for s in part.header.sources)),
        tuple(dict.fromkeys(d for part in parts for d in part.header.domains)),
        progress={"tokens": sum(int(part.header.progress.get("tokens", 0)) for part in parts), "complete": True},
    )
    for layer in range(len(first.layers)):
        by_domain: dict[str, Statistics] = {}
        for part in parts:
            for domain, found in part.statistics(layer).items():
                by_domain[domain] = added([by_domain[domain], found]) if domain in by_domain else found
        save_state(scratch, header, f"state-{layer}", {layer: by_domain}, scratch / header.state if header.state else None)
    if "C" in first.tiers:
        with (scratch / FEATURES).open("wb") as stream:
            for part in parts:
                for segment in segments.read(part.folder / FEATURES).found:
                    segments.append(stream, segment.columns, segment.metadata)
    os.rename(scratch, out)
    return open_calibration(out)
