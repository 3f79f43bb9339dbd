"""`moesaic bench layer`: one bank of SwiGLU experts, ours against every peer that can run, and the floor.

Everybody gets the same inputs, routings and weights. A round runs every contestant once, on inputs that change from
round to round, so that a small case does not stay in the cache. Shape legend: as in core/routing.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.bench import machine, peers
from moesaic.bench.routings import draw, shares
from moesaic.bench.runner import interleave, relative_error, speedup, summary
from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import QuantizedBank, dispatch_slots, expert_mlp, pack, quantize_bank
from moesaic.kernels.packing import can_pack

FRESH = 8
"""Inputs and routings per case that the rounds cycle through."""

GPU_SHAPES = {
    "1.4B fine": (40960, 768, 256, 128, 8),
    "7B fine": (24576, 1536, 256, 128, 8),
    "30B fine": (32768, 4096, 256, 256, 16),
    "OLMoE": (8192, 2048, 1024, 64, 8),
    "Qwen3-30B-A3B": (8192, 2048, 768, 128, 8),
}
"""Name -> T, D, I, E, K of the shapes that published GPU layers are compared at."""


@dataclass
class Options:
    tokens: tuple[int, ...] = (1, 4, 16, 64, 512)
    width: int = 1024
    inner: int = 512
    experts: int = 64
    slots: int = 8
    dtypes: tuple[str, ...] = ("bf16", "fp32", "int8", "int4")
    routings: tuple[str, ...] = ("uniform", "zipf", "real")
    train: bool = False
    device: str = "cpu"
    rounds: int = 40
    seconds: float = 3.0
    routing_data: Path = Path("../shared/data/routing")
    shapes: bool = False

    def check(self) -> None:
        for name, values, known in (
            ("dtype", self.dtypes, ("bf16", "fp32", "int8", "int4")),
            ("routing", self.routings, ("uniform", "zipf", "real")),
        ):
            for value in values:
                if value not in known:
                    raise BadInput(f"unknown {name} {value!r}: one of {', '.join(known)}")
        sizes = (*self.tokens, self.width, self.inner, self.experts, self.slots, self.rounds)
        if min(sizes) < 1:
            raise BadInput("sizes and rounds are at least 1")
        if self.slots > self.experts:
            raise BadInput(f"{self.slots} slots from {self.experts} experts: slots are different experts")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: no CUDA device on this machine")


@dataclass(frozen=True)
class Sizes:
    T: int
    D: int
    I: int
    E: int
    K: int


Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, D], experts [T, K], weights [T, K] -> y [T, D]."""


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """{machine, profile, options, notes, rows}: one row per contestant and case."""
    options.check()
    header = machine.describe(options.device)
    progress("measuring the machine")
    profile = machine.load_or_measure(options.device)
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, list[Sizes]]] = [
        ("", [Sizes(T, options.width, options.inner, options.experts, options.slots) for T in options.tokens])
    ]
    if options.shapes:
        cases = [(name, [Sizes(*shape)]) for name, shape in GPU_SHAPES.items()]
    for name, sizes in cases:
        rows += _bank(name, sizes, options, profile, notes, progress)
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {"machine": header, "profile": profile, "options": shown, "notes": sorted(set(notes)), "rows": rows}


def _bank(name, sizes: list[Sizes], options: Options, profile, notes: list[str], progress) -> list[dict[str, Any]]:
    """All cases that share one set of weights."""
    torch.manual_seed(0)
    D, I, E = sizes[0].D, sizes[0].I, sizes[0].E
    rows: list[dict[str, Any]] = []
    for dtype_name in ("fp32", "bf16"):
        formats = [d for d in options.dtypes if d == dtype_name or (dtype_name == "bf16" and d in ("int8", "int4"))]
        if options.train:
            formats = [d for d in formats if d in ("fp32", "bf16")]
        if not formats:
            continue
        dtype = torch.float32 if dtype_name == "fp32" else torch.bfloat16
        gate_up = (torch.randn(E, 2 * I, D, device=options.device) / D**0.5).to(dtype).requires_grad_(options.train)
        down = (torch.randn(E, D, I, device=options.device) / I**0.5).to(dtype).requires_grad_(options.train)
        layers = _layers(gate_up, down, formats, options, notes)
        for kind in options.routings:
            shares_E = shares(kind, E, options.routing_data)
            if shares_E is None:
                notes.append(f"routing 'real' skipped: no {options.routing_data}/olmoe-counts.npz (see --routing-data)")
                continue
            for size in sizes:
                progress(f"{name} {dtype_name} {kind} T={size.T}".strip())
                rows += _case(name, size, kind, shares_E, gate_up, down, layers, options, profile)
        del layers, gate_up, down
        gc.collect()
    return rows


def _layers(
    gate_up: Tensor, down: Tensor, formats: list[str], options: Options, notes: list[str]
) -> dict[str, tuple[str, Layer]]:
    """Contestant -> (format of its weights, layer)."""
    E = gate_up.shape[0]
    cpu = torch.device(options.device).type == "cpu"
    plain = "fp32" if gate_up.dtype == torch.float32 else "bf16"

    def ours(backend: str, **how: Any) -> Layer:
        return lambda x, experts, weights: expert_mlp(
            x, dispatch_slots(experts, weights, E), gate_up, down, backend=backend, **how
        )

    def stored(bank: QuantizedBank) -> Layer:
        return lambda x, experts, weights: bank.run(x, dispatch_slots(experts, weights, E))

    layers: dict[str, tuple[str, Layer]] = {}
    if plain in formats or not cpu:
        layers["moesaic auto" if options.train or not cpu else "moesaic cpu"] = plain, ours("auto")
        if cpu and not options.train and can_pack(gate_up.dtype):
            layers["moesaic cpu packed"] = plain, ours("auto", packed=pack(gate_up, down))
        if not options.train or not cpu:
            layers["moesaic torch"] = plain, ours("torch")
    if cpu and not options.train:
        for name in ("int8", "int4"):
            if name not in formats:
                continue
            try:
                layers[f"moesaic cpu {name}"] = name, stored(quantize_bank(gate_up, down, int(name[3:])))
            except BadInput as error:
                notes.append(f"{name} skipped: {error}")
    for name, layer in peers.find(gate_up, down, options.slots, max(options.tokens), options.train, notes).items():
        if name == "transformers grouped_mm" or plain in formats:
            layers[name] = plain, layer
    return layers


def _case(name, size: Sizes, kind: str, shares_E, gate_up, down, layers, options: Options, profile) -> list[dict[str, Any]]:
    inputs = []
    for _ in range(FRESH):
        experts_TK, weights_TK = draw(shares_E, size.T, size.K)
        x_TD = torch.randn(size.T, size.D, device=options.device, dtype=gate_up.dtype).requires_grad_(options.train)
        inputs.append((x_TD, experts_TK.to(options.device), weights_TK.to(options.device, gate_up.dtype)))
    cotangent_TD = torch.randn_like(inputs[0][0])

    def step(layer: Layer) -> Callable[[int], Tensor]:
        def once(i: int) -> Tensor:
            x_TD, experts_TK, weights_TK = inputs[i % FRESH]
            if not options.train:
                with torch.inference_mode():
                    return layer(x_TD, experts_TK, weights_TK)
            weights_TK = weights_TK.detach().requires_grad_()
            y_TD = layer(x_TD, experts_TK, weights_TK)
            torch.autograd.grad(y_TD, (x_TD, weights_TK, gate_up, down), cotangent_TD)
            return y_TD.detach()

        return once

    field = {n: (form, layer) for n, (form, layer) in layers.items() if peers.runs(n, size.T, options.train)}
    with torch.no_grad():
        x_TD, experts_TK, weights_TK = inputs[0]
        exact_TD = expert_mlp(
            x_TD.float(),
            Dispatch.of_slots(experts_TK, weights_TK.float(), size.E),
            gate_up.float(),
            down.float(),
            backend="reference",
        )
    steps = {n: step(layer) for n, (_, layer) in field.items()}
    errors = {n: relative_error(run_once(0), exact_TD) for n, run_once in steps.items()}
    memory = {n: _peak_bytes(run_once, options) for n, run_once in steps.items()}
    seconds = interleave(steps, options.rounds, options.seconds, options.device)
    base = seconds.get("transformers grouped_mm")
    rows = []
    for n, times in seconds.items():
        form = field[n][0]
        hit = sum(experts.unique().numel() for _, experts, _ in inputs) / FRESH
        row = {
            "impl": n,
            "shape": name or None,
            **asdict(size),
            "dtype": form,
            "routing": kind,
            "train": options.train,
            "experts_hit": hit,
            **summary(times),
            **floor(size, hit, form, options.train, profile),
            "ratio_to_grouped_mm": None if base is None else speedup(base, times),
            "error": errors[n],
            "flops_per_second": _flops(size, options.train) / summary(times)["seconds"],
        }
        if memory[n] is not None:
            row["peak_activation_bytes"] = memory[n]
        rows.append(row)
    return rows


def _flops(size: Sizes, train: bool) -> float:
    return (18 if train else 6) * size.T * size.K * size.D * size.I


def floor(size: Sizes, hit: float, form: str, train: bool, profile: dict[str, Any]) -> dict[str, Any]:
    """The least time this machine allows: weights of the hit experts once and tokens in and out over its read bandwidth,
    or the arithmetic over its matmul peak. Training reads the weights twice and writes a gradient for every expert."""
    width = {"fp32": 4, "bf16": 2, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}[form]
    expert = 3 * size.D * size.I * width
    tokens = 2 * size.T * size.D * (4 if form == "fp32" else 2)
    moved = hit * expert + tokens
    if train:
        moved = 2 * hit * expert + size.E * expert + 2 * tokens + 2 * size.T * size.K * 2 * size.I * width
    peak = profile["float32_flops" if form == "fp32" else "bfloat16_flops"]
    by_bytes, by_flops = moved / profile["read_bytes_per_second"], _flops(size, train) / peak
    return {"floor_seconds": max(by_bytes, by_flops), "floor": "bytes" if by_bytes >= by_flops else "flops"}


def _peak_bytes(run_once: Callable[[int], Tensor], options: Options) -> int | None:
    """Memory a step allocates on the GPU above what is resident before it (weights and inputs)."""
    if torch.device(options.device).type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
