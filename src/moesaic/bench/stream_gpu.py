"""`moesaic bench stream-gpu`: a model of 30B-A3B's shape whose experts lie in host memory, on a GPU that may use little of its
own, ours beside accelerate's CPU offload.

Weights are random, made on the GPU and laid in host memory, with the gains of generated.py that give routing the locality
of a trained model. The device budget is for everything: other weights, keys and values, room to work in, and experts. All
contestants use one model object, one after another, and read the same tokens one by one. The floor is the bytes that ours
moved per token over what the link gives to copies of one expert; accelerate's is a whole model's experts per token.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from moesaic.bench import generated, machine
from moesaic.bench.token_stream import tokens
from moesaic.core.errors import BadInput
from moesaic.core.sizes import parse_bytes, show_bytes

SIZES = {
    "30b-a3b": generated.Size(2048, 768, 48, 128, 8, 32, 4, 128, 151936),
    "tiny": generated.Size(256, 128, 2, 8, 2, 4, 2, 32, 8192),
}
WORKING = 1 << 30
"""Bytes of the device budget left to activations, keys and values, and libraries."""


@dataclass
class Options:
    """`budget`: of everything on the device. `policies`: of the device tier. `slow_steps`: tokens that accelerate is given."""

    size: str = "30b-a3b"
    budget: str = "12GB"
    policies: tuple[str, ...] = ("lru", "hybrimoe:ahead=0")
    peers: tuple[str, ...] = ("moesaic", "accelerate")
    device: str = "cuda"
    prompt: int = 32
    warm: int = 48
    steps: int = 64
    slow_steps: int = 3
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises BadInput for what cannot be run, before any memory is taken."""
        if self.size not in SIZES:
            raise BadInput(f"--size {self.size!r}: one of {', '.join(SIZES)}")
        for name in self.peers:
            if name not in ("moesaic", "accelerate"):
                raise BadInput(f"--peers {name!r}: moesaic or accelerate")
        if min(self.prompt, self.warm, self.steps, self.slow_steps) < 1:
            raise BadInput("--prompt, --warm and --steps: at least 1")
        if not self.device.startswith("cuda") or not torch.cuda.is_available():
            raise BadInput(f"bench stream-gpu needs a CUDA device: PyTorch {torch.__version__} finds none for {self.device!r}")
        self.expert_budget()

    def expert_budget(self) -> int:
        """What the budget leaves to experts."""
        size = SIZES[self.size]
        other = 2 * size.other_weights + (WORKING if self.size != "tiny" else 0)
        left = parse_bytes(self.budget, "--budget") - other
        if left < 2 * size.expert_weights:
            raise BadInput(f"--budget {self.budget}: other weights and room to work take {show_bytes(other)} of it")
        return left


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """A row per contestant."""
    options.check()
    size, header = SIZES[options.size], machine.describe(options.device)
    ids = tokens(options.prompt + options.warm + options.steps)
    progress("making the model")
    began = time.perf_counter()
    model = build(size, torch.device(options.device))
    made = time.perf_counter() - began
    rows = []
    link = link_bandwidth(options.device, 2 * size.expert_weights)
    if "moesaic" in options.peers:
        for policy in options.policies:
            progress(f"moesaic {policy}")
            rows.append(_ours(model, policy, options, ids, link))
    if "accelerate" in options.peers:
        progress("accelerate")
        rows.append(_accelerate(model, options, ids, link, 2 * size.bank_weights))
    return {
        "machine": header, "size": options.size, "budget_bytes": parse_bytes(options.budget, "--budget"),
        "expert_budget_bytes": options.expert_budget(), "expert_total_bytes": 2 * size.bank_weights,
        "link_bytes_per_second": link, "build_seconds": made, "rows": rows, "notes": options.notes,
    }  # fmt: skip


def build(size: generated.Size, device: torch.device, seed: int = 0) -> Any:
    """The model on the CPU in bf16; its weights are drawn on `device`, a matrix at a time."""
    from transformers import Qwen3MoeForCausalLM

    class Bare(Qwen3MoeForCausalLM):
        """Without the initialisation that every weight here gets another value after."""

        def init_weights(self) -> None:
            pass

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        config = generated._config(size)
        config._experts_implementation = "moesaic"
        model = Bare(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.__class__ = Qwen3MoeForCausalLM
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1)
                continue
            gain = generated.ATTENTION_GAIN if name.endswith("o_proj.weight") else 1.0
            gain = math.sqrt(weight.shape[-1]) if "embed_tokens" in name else gain
            for matrix in weight if weight.dim() == 3 else [weight]:
                drawn = torch.empty(matrix.shape, dtype=torch.bfloat16, device=device)
                matrix.copy_(drawn.normal_(0, gain / math.sqrt(matrix.shape[-1]), generator=random))
    return model


def link_bandwidth(device: str, nbytes: int, rounds: int = 64) -> float:
    """Bytes per second from page-locked memory, in copies of one expert."""
    source = torch.empty(rounds, nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    best = math.inf
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for row in source:
            target.copy_(row, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return rounds * nbytes / best


def _feed(model: Any, ids: list[int], device: str, cache: Any = None) -> tuple[list[float], Any, list[int]]:
    """Seconds of every token of `ids`, read one by one after `cache`; the cache, and the ten likeliest tokens at the end."""
    seconds, top = [], list[int]()
    with torch.inference_mode():
        for token in ids:
            torch.cuda.synchronize()
            began = time.perf_counter()
            made = model(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True)
            cache, top = made.past_key_values, made.logits[0, -1].float().topk(10).indices.tolist()
            seconds.append(time.perf_counter() - began)
    return seconds, cache, top


def _prefill(model: Any, ids: list[int], device: str) -> tuple[float, Any]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        made = model(torch.tensor([ids], device=device), use_cache=True)
    made.logits[0, -1].argmax().item()
    return time.perf_counter() - began, made.past_key_values


def _row(name: str, seconds: list[float], first: float, top: list[int], link: float, moved: float) -> dict[str, Any]:
    mean = sum(seconds) / len(seconds)
    return {
        "impl": name, "seconds": mean, "seconds_median": median(seconds), "seconds_min": min(seconds),
        "seconds_max": max(seconds), "tokens_per_second": 1 / mean, "prefill_seconds": first, "steps": len(seconds),
        "moved_bytes_per_token": moved, "floor_seconds": moved / link, "of_floor": moved / link / mean, "top": top,
        "peak_device_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def _ours(model: Any, policy: str, options: Options, ids: list[int], link: float) -> dict[str, Any]:
    from moesaic.serving.streamed.device_load import over_memory

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    tier = over_memory(model, options.device, options.expert_budget(), policy=policy)
    try:
        first, cache = _prefill(model, ids[: options.prompt], options.device)
        warm = options.prompt + options.warm
        _, cache, _ = _feed(model, ids[options.prompt : warm], options.device, cache)
        tier.clear()
        seconds, _, top = _feed(model, ids[warm:], options.device, cache)
        row = _row(f"moesaic {policy}", seconds, first, top, link, tier.stats.moved_bytes / len(seconds))
        return row | tier.stats.row() | {"hardware": tier.hardware.describe()}
    finally:
        tier.close()
        tier.detach()
        del tier
        gc.collect()
        torch.cuda.empty_cache()


def _accelerate(model: Any, options: Options, ids: list[int], link: float, bank_bytes: int) -> dict[str, Any]:
    """Whole layers on the device as far as the budget goes, the others offloaded to host memory: `dispatch_model`."""
    from accelerate import dispatch_model

    size = SIZES[options.size]
    model.to("cpu")
    model.set_experts_implementation("grouped_mm")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    layer = 2 * (size.bank_weights + size.other_weights) // size.layers
    kept = max(0, (options.expert_budget() - 2 * layer) // layer)  # room for the layer under way and the next
    main = torch.device(options.device).index or 0
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), main)
    places |= {f"model.layers.{i}": main if i < kept else "cpu" for i in range(size.layers)}
    dispatch_model(model, device_map=places, main_device=main, force_hooks=True)
    first, cache = _prefill(model, ids[: options.prompt], options.device)
    at = options.prompt
    _, cache, _ = _feed(model, ids[at : at + 1], options.device, cache)
    seconds, _, top = _feed(model, ids[at + 1 :][: options.slow_steps], options.device, cache)
    moved = bank_bytes * (size.layers - kept) / size.layers
    return _row("accelerate cpu offload", seconds, first, top, link, moved) | {"resident_layers": kept}
