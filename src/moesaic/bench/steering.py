"""`moesaic bench steering`: what each steering method costs per written token, beside the same model as it is.

Rows are interleaved: in every round each contestant writes the same number of tokens greedily from the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from moesaic.bench import machine
from moesaic.bench.runner import interleave, summary
from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.mogu import Mogu
from moesaic.steering.mogu_adapter import MoguAdapter
from moesaic.steering.references import collect
from moesaic.view import load, view

BASE = "generate"


@dataclass
class Options:
    model: str = "bundled"
    dtype: str = "auto"
    prompt: int = 64
    """Tokens of the prompt."""
    tokens: int = 32
    """New tokens of each answer."""
    rounds: int = 10
    seconds: float = 120.0

    def check(self) -> None:
        if min(self.prompt, self.tokens, self.rounds) < 1:
            raise BadInput("--prompt, --tokens and --rounds are at least 1")


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """{machine, options, rows}: seconds per answer and per token of each method, and times the unsteered model's."""
    options.check()
    header = machine.describe("cpu")
    progress("loading the model")
    model, tokenizer = load(options.model, dtype=options.dtype)
    random = torch.Generator().manual_seed(0)
    ids_BN = torch.randint(16, model.get_input_embeddings().num_embeddings, (1, options.prompt), generator=random)
    how = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    contestants: dict[str, Callable[[int], Any]] = {BASE: lambda number: model.generate(ids_BN, **how)}
    for name, spec in specs(model, ids_BN[0].tolist()).items():
        progress(f"building {name}")
        contestants[name] = partial(_write, model, ids_BN, bound(model, spec, tokenizer), how)
    for contestant in contestants.values():
        contestant(0)
    progress(f"{len(contestants)} contestants in turn")
    with torch.inference_mode():
        seconds = interleave(contestants, options.rounds, options.seconds, "cpu")
    base = summary(seconds[BASE])["seconds"]
    rows = []
    for name in contestants:
        made = summary(seconds[name])
        rows.append({
            "impl": name, "prompt": options.prompt, "tokens": options.tokens, **made,
            "seconds_per_token": made["seconds"] / options.tokens, "times_base": made["seconds"] / base,
            "floor_seconds": None, "error": None,
        })  # fmt: skip
    return {"machine": header, "options": asdict(options), "rows": rows}


def specs(model: Any, prompt: list[int]) -> dict[str, Any]:
    """A spec of every method that any decoder takes. The references of C3PO are four prompts of the prompt's length."""
    blocks = view(model)
    off = {block.name: [0] for block in blocks}
    rows: list[Any] = []
    with torch.no_grad():
        for shift in range(1, 5):
            ids = prompt[shift:] + prompt[:shift]
            rows.append((ids, [int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())], None))
    store = collect(model, blocks, rows)
    from moesaic.steering.c3po import C3po

    return {
        "k, mask": {"k": 1, "without": [0]},
        "threshold": {"threshold": 0.3},
        "logits": {"logits": {block.name: [0.1] * block.num_experts for block in blocks}},
        "mote off": {"steer": {"mote": {"off": off}}},
        "mote on": {"steer": {"mote": {"on": off}}},
        "naee_skip": "naee_skip:beta=0.5",
        "scmoe": "scmoe",
        "rewiring": "rewiring",
        "c3po regression": C3po(store, leak=1.0),
        "c3po alpha 0": C3po(store, alpha=0.0, leak=1.0),
        "c3po ngd": C3po(store, "ngd", leak=1.0),
        "mogu": Mogu(MoguAdapter(model).eval()),
    }


def _write(model: Any, ids_BN: torch.Tensor, steer: Any, how: dict[str, Any], number: int = 0) -> None:
    write(model, ids_BN, steer, **how)
