"""`moesaic bench trace`: what recording costs a forward pass, what the file weighs beside JSON lines, how fast it opens."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from moesaic.bench import machine
from moesaic.bench.runner import interleave, summary
from moesaic.core.errors import BadInput
from moesaic.trace import open_trace, trace
from moesaic.trace.edit import save
from moesaic.trace.file import Trace, from_arrays
from moesaic.view import View, load, view

OPENED_CHOICES = 100_000_000


@dataclass
class Options:
    rounds: int = 60
    seconds: float = 40.0
    device: str = "cpu"
    cases: tuple[str, ...] = ("bundled", "k8")

    def check(self) -> None:
        for name in self.cases:
            if name not in MODELS:
                raise BadInput(f"--cases {name!r}: one of {', '.join(MODELS)}")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: no CUDA device on this machine")


def _bundled(device: str) -> Any:
    return load("bundled", device=device).model


def _k8(device: str) -> Any:
    """A generated Qwen3-MoE with OLMoE's fan-out: 64 experts, eight per token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=8192, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, moe_intermediate_size=128, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=True, max_position_embeddings=2048, experts_implementation="moesaic",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(device)


MODELS: dict[str, Callable[[str], Any]] = {"bundled": _bundled, "k8": _k8}
PASSES = {"prefill": (4, 512, 0), "decode": (1, 16, 32), "decode x4": (4, 16, 24)}
"""Case -> rows, prompt tokens, generated tokens."""


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The rows of every case. Raises BadInput for a case that does not exist."""
    options.check()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="moesaic-bench-") as folder:
        for name in options.cases:
            model = MODELS[name](options.device)
            for kind in PASSES:
                progress(f"{name}, {kind}")
                rows += _overhead(name, kind, model, options, Path(folder))
            progress(f"{name}, size")
            rows += _size(name, model, options.device, Path(folder))
        progress(f"opening {OPENED_CHOICES:,} choices")
        rows += _opening(Path(folder))
    return {"machine": machine.describe(options.device), "rows": rows, "notes": []}


def _overhead(name: str, kind: str, model: Any, options: Options, folder: Path) -> list[dict[str, Any]]:
    batch, prompt, new = PASSES[kind]
    vocabulary = model.config.vocab_size
    texts = [torch.randint(1, vocabulary, (batch, prompt), device=options.device) for _ in range(4)]

    def work(i: int, **given: Any) -> Any:
        ids = texts[i % len(texts)]
        with torch.inference_mode():
            if not new:
                return model(input_ids=ids, use_cache=False, logits_to_keep=1, **given)
            sampling = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
            return model.generate(ids, attention_mask=torch.ones_like(ids), **sampling)

    opened = ExitStack()

    def watched(log: Any) -> Callable[[int], Any]:
        """Attached for the time of a round, with its file open throughout, as in a recording of hours."""

        def once(i: int) -> Any:
            log.attach()
            try:
                return work(i)
            finally:
                log.detach()

        opened.callback(log.close)
        return once

    def traced(name: str, **kept: Any) -> Callable[[int], Any]:
        return watched(trace(model, folder / f"{name}.moetrace", overwrite=True, **kept))

    contestants: dict[str, Callable[[int], Any]] = {
        "forward alone": work,
        "moesaic.trace": traced("all"),
        "moesaic.trace, logits too": traced("logits", logits=True),
        "JSON lines": watched(JsonLines(view(model), folder / "bench.jsonl")),
    }
    if not new:
        contestants["transformers router logits"] = lambda i: _kept(work(i, output_router_logits=True))
    with opened:
        seconds = interleave(contestants, options.rounds, options.seconds, options.device)
    base = seconds["forward alone"]
    return [
        {
            "impl": impl,
            "model": name,
            "case": kind,
            "T": batch * (prompt + new - 1 if new else prompt),
            **summary(times),
            "floor_seconds": median(base),
            "overhead": median(t / b for t, b in zip(times, base, strict=True)) - 1,
            "error": None,
        }
        for impl, times in seconds.items()
    ]


def _kept(output: Any) -> list[np.ndarray]:
    """What a user of `output_router_logits=True` keeps."""
    return [logits.float().cpu().numpy() for logits in output.router_logits]


class JsonLines:
    """The usual logger: a line per token and layer, as `json_line` writes it."""

    def __init__(self, blocks: View, path: Path) -> None:
        self.blocks, self.stream = blocks, path.open("w")

    def attach(self) -> None:
        self.handles = [block.on_choice(self._write) for block in self.blocks]

    def _write(self, choice: Any, block: Any) -> None:
        for position, (ids, weights) in enumerate(zip(choice.ids.tolist(), choice.weights.float().tolist(), strict=True)):
            self.stream.write(json_line((0, 0, position, 0, "text"), block.layer, ids, weights))

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def close(self) -> None:
        self.stream.close()


def json_line(where: tuple[int, int, int, int, str], layer: int, ids: list[int], weights: list[float] | None) -> str:
    """One record as Python's own `json` writes it, with what a row of a trace knows."""
    names = ("sequence", "step", "position", "token_id", "domain")
    record: dict[str, Any] = {**dict(zip(names, where, strict=True)), "layer": layer, "experts": ids}
    if weights is not None:
        record["weights"] = weights
    return json.dumps(record) + "\n"


def jsonl_bytes(found: Trace, weights: bool) -> int:
    """Bytes of a trace as JSON lines, one line per token and layer."""
    total = 0
    names = [*found.domains, ""]
    assert found.tokens_T is not None
    for t in range(len(found)):
        numbers = (found.sequence_T[t], found.step_T[t], found.position_T[t], found.tokens_T[t])
        where = (*map(int, numbers), names[found.domain_T[t]])
        for layer in range(len(found.layers)):
            ids = found.experts_TLK[t, layer]
            kept = ids != found.empty
            values = None
            if weights and found.weights_TLK is not None:
                values = found.weights_TLK[t, layer][kept].astype(np.float32).tolist()
            total += len(json_line(where, layer, ids[kept].tolist(), values))
    return total


def _size(name: str, model: Any, device: str, folder: Path) -> list[dict[str, Any]]:
    """Bytes per choice of a batch of text, with and without weights, beside the same as JSON lines."""
    rows: list[dict[str, Any]] = []
    ids = torch.randint(1, model.config.vocab_size, (2, 512), device=device)
    for weights in (True, False):
        path = folder / "size.moetrace"
        with trace(model, path, overwrite=True, weights=weights, domain="text") as recorder, torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        found = recorder.result
        assert found is not None
        lines = jsonl_bytes(found, weights)
        held = path.stat().st_size
        rows.append(
            {
                "impl": "moesaic.trace" if weights else "moesaic.trace, ids only",
                "model": name,
                "case": "size",
                "T": len(found),
                "seconds": None,
                "floor_seconds": None,
                "error": None,
                "file_bytes": held,
                "bytes_per_choice": held / found.choices,
                "id_bytes_per_choice": found.experts_TLK.itemsize,
                "jsonl_bytes": lines,
                "smaller_than_jsonl": lines / held,
            }
        )
    return rows


def _opening(folder: Path) -> list[dict[str, Any]]:
    """Time until a trace of 10^8 choices is open and its first and last rows are read."""
    tokens = OPENED_CHOICES // (16 * 8)
    rng = np.random.default_rng(0)
    some = rng.integers(0, 64, (1 << 12, 16, 8), np.uint8)
    ids = np.tile(some, (-(-tokens // len(some)), 1, 1))[:tokens]
    path = folder / "large.moetrace"
    save(from_arrays(ids, 64, lengths=[tokens // 100] * 99 + [tokens - 99 * (tokens // 100)]), path)
    times = []
    for _ in range(9):
        began = time.perf_counter()
        found = open_trace(path)
        assert int(found.experts_TLK[0, 0, 0]) + int(found.experts_TLK[-1, -1, -1]) < 128
        times.append(time.perf_counter() - began)
    facts = {"impl": "moesaic.open_trace", "model": None, "case": f"open {tokens * 128:,} choices", "T": tokens}
    return [{**facts, **summary(times), "floor_seconds": None, "error": None, "file_bytes": path.stat().st_size}]
