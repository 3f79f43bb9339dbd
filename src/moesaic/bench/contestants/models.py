"""moesaic and transformers as contestants: `python -m moesaic.bench.contestants.models FOLDER THREADS HOW-AS-JSON`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.bench.contestants.loop import answer


class Model:
    """A transformers model that is fed given tokens, one by one or a prompt at a time."""

    def __init__(self, model: Any, facts: Callable[[], dict[str, Any]] = dict) -> None:
        self.model, self.own_facts = model, facts
        self.cache: Any = None

    def _run(self, ids: list[int]) -> None:
        with torch.inference_mode():
            made = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.logits_V = made.past_key_values, made.logits[0, -1]

    def prefill(self, ids: list[int]) -> None:
        self.cache = None
        self._run(ids)

    def step(self, token: int) -> None:
        self._run([token])

    def top(self) -> list[int]:
        return self.logits_V.float().topk(10).indices.tolist()

    def facts(self) -> dict[str, Any]:
        return self.own_facts()


def moesaic_resident(folder: Path, quantize: str | None = None) -> Model:
    from moesaic.view import load
    from moesaic.view.quick import quicken

    model = load(folder).model
    if quantize:
        from moesaic.view.quantize import quantize_model

        quantize_model(model, quantize)
    quicken(model)
    return Model(model)


def moesaic_streamed(folder: Path, **how: Any) -> Model:
    from moesaic.serving.streamed import load_streamed
    from moesaic.serving.streamed.describe import streaming_facts
    from moesaic.view.quick import quicken

    streamed = load_streamed(folder, **how)
    quicken(streamed.model)

    def facts() -> dict[str, Any]:
        made = streaming_facts(streamed)
        streamed.engine.clear()
        return made

    return Model(streamed.model, facts)


def transformers_resident(folder: Path, experts: str) -> Model:
    from transformers import AutoModelForCausalLM

    return Model(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation=experts))


def accelerate_offload(folder: Path, resident: float, offload: str) -> Model:
    """Whole layers on disk, but for the first ones: what transformers does with `device_map` and `offload_folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    layers = config.num_hidden_layers
    kept = round(resident * layers)
    places: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": "cpu" if i < kept else "disk" for i in range(layers)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=places, offload_folder=offload)
    return Model(model)


KINDS: dict[str, Callable[..., Model]] = {
    "moesaic": moesaic_resident,
    "streamed": moesaic_streamed,
    "transformers": transformers_resident,
    "accelerate": accelerate_offload,
}

if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    how = json.loads(sys.argv[3])
    kind = how.pop("kind")
    answer(lambda: KINDS[kind](Path(sys.argv[1]), **how))
