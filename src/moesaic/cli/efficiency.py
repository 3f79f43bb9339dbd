"""`moesaic eval MODEL --efficiency`: what it takes to write with a model, measured here and now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from moesaic.cli.common import progress_console
from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes

PROMPT_TOKENS = 32
WARM_UP = 2
PROMPTS = (
    "Once upon a time there was a small house by the sea, and in it lived",
    "The committee met on Tuesday to discuss the new budget. The first question was",
    "def mean(values):\n    total = 0\n",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir, thank you for your letter of last week. I am writing to",
    "In the middle of the nineteenth century, most people in Europe worked",
    "The recipe needs two eggs, a cup of flour and some milk. First,",
    "Every router scores the experts for a token and keeps the best, so",
)
"""Prompts where --data gives none."""


def check(requests: int, new_tokens: int, against: str | None, data: str, wanted: bool) -> None:
    """Raises BadInput for options that do not go together."""
    if not wanted:
        if against is not None:
            raise BadInput(f"--against {against} compares efficiency: give --efficiency with it")
        return
    for option, value in (("--requests", requests), ("--new-tokens", new_tokens)):
        if value < 1:
            raise BadInput(f"{option} {value}: must be at least 1")
    if against is not None and not data:
        raise BadInput(f"--against {against}: how well both models write is measured on a text: give --data")


def measure(
    loaded: Any,
    tokenizer: Any,
    source: Any,
    texts: Sequence[str],
    requests: int,
    new_tokens: int,
    streamed: Any = None,
) -> dict[str, Any]:
    """The six metrics while the model answers `requests` prompts one by one; `weight_bytes`: all its weights, wherever."""
    from moesaic.bench import machine
    from moesaic.evaluation import efficiency as e
    from moesaic.evaluation.probes import Gauge, memory_gauges

    prompts = _prompts(loaded, tokenizer, texts, requests, new_tokens)
    files = sorted(source.glob("*.safetensors")) if isinstance(source, Path) else []
    device = loaded.get_input_embeddings().weight.device.type
    narrow = next(loaded.parameters()).element_size() == 2
    peak = machine.load_or_measure(device)["bfloat16_flops" if narrow else "float32_flops"]
    held = e.held_bytes(loaded)

    def in_memory() -> float:
        return held + (0 if streamed is None else streamed.engine.held_bytes)

    meter = e.Meter([Gauge("weights", in_memory), *memory_gauges(files)])
    columns = (TextColumn("answering"), BarColumn(), TextColumn("{task.completed} / {task.total} requests"))
    with Progress(*columns, console=progress_console, transient=True) as bar:
        task = bar.add_task("answering", total=len(prompts))
        e.measure_generation(
            loaded,
            prompts,
            new_tokens,
            meter,
            waited=(lambda: 0.0) if streamed is None else (lambda: streamed.stats.stall_seconds),
            warm_up=WARM_UP,
            progress=lambda done: bar.update(task, completed=done),
        )
    found = e.Efficiency(meter, e.Parameters.of(loaded), peak).row()
    on_disk = 0 if streamed is None else streamed.engine.shape.total_bytes
    return found | {"new_tokens": new_tokens, "warm_up": WARM_UP, "weight_bytes": held + on_disk}


def compare(mine: dict[str, Any], bits_per_byte: float, against: str, documents: list[Any], **how: Any) -> dict[str, Any]:
    """MCR of this model as the compressed form of `against`; performance is 1 / bits per byte of the same text."""
    from moesaic.cli.loading import open_model
    from moesaic.evaluation import bits_per_byte as bpb
    from moesaic.evaluation import efficiency as e

    scoring = {key: how.pop(key) for key in ("context", "stride", "batch_size")}
    opened = open_model(against, dense_ok=True, **how)
    other, tokenizer = opened.model, opened.tokenizer
    theirs = bpb.report(against, bpb.score_documents(other, tokenizer, documents, **scoring))["bits_per_byte"]
    size = e.held_bytes(other)
    return {
        "against": against,
        "against_weight_bytes": size,
        "against_bits_per_byte": theirs,
        "mcr": e.compression_rate(size, mine["weight_bytes"], 1 / theirs, 1 / bits_per_byte),
    }


def _prompts(model: Any, tokenizer: Any, texts: Sequence[str], requests: int, new_tokens: int) -> list[list[int]]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    most = PROMPT_TOKENS if longest is None else min(PROMPT_TOKENS, longest - new_tokens)
    if most < 1:
        raise BadInput(f"--new-tokens {new_tokens}: this model takes {longest} tokens, one of them of a prompt")
    given = [text for text in texts if text.strip()] or PROMPTS
    ids = [list(tokenizer(given[i % len(given)], verbose=False)["input_ids"])[:most] for i in range(requests)]
    if not all(ids):
        raise BadInput("a prompt of the text has no token: give longer documents with --data")
    return ids


def table(row: dict[str, Any]) -> Table:
    """The metrics for people."""
    found = Table(title=f"efficiency: {row['iterations']} requests of {row['new_tokens']} new tokens, one at a time")
    for name in ("metric", "value", "what it is"):
        found.add_column(name, justify="right" if name == "value" else "left")
    for tier, mean in row["amu_bytes"].items():
        share = f", {row['amu_share'][tier]:.1%} of it" if tier in row["amu_share"] else ""
        found.add_row("AMU", show_bytes(mean), f"memory in use, mean: {tier.replace('_', ' ')}{share}")
    found.add_row("PCU", f"{row['pcu_time']:.1%}", "of all cores' time computing")
    if row["pcu_flops"] is not None:
        found.add_row("", f"{row['pcu_flops']:.1%}", f"of {row['peak_flops'] / 1e9:,.0f} GFLOP/s, the peak measured here")
    low, median, high = row["al_seconds_min_median_max"]
    spread = f"{low:.3f} to {high:.3f}, median {median:.3f}"
    found.add_row("AL", f"{row['al_seconds']:.3f} s", f"a request ({spread}), of it {row['al_waiting_seconds']:.3f} s waiting")
    found.add_row("IT", f"{row['it_tokens_per_second']:.1f} /s", "tokens written")
    if row["aec_watts"] is None:
        found.add_row("AEC", "-", "not measured: " + "; ".join(w for n, w in row["not_measured"].items() if "energy" in n))
    else:
        watts = f"mean power; {row['energy_joules']:.1f} J in all, {row['joules_per_token']:.2f} J per token"
        found.add_row("AEC", f"{row['aec_watts']:.1f} W", f"{watts} ({', '.join(row['joules_by_source'])})")
    if "mcr" in row:
        sizes = f"{show_bytes(row['against_weight_bytes'])} to {show_bytes(row['weight_bytes'])}"
        found.add_row("MCR", f"{row['mcr']:.3f}", f"against {row['against']}: {sizes}, times bits per byte before over after")
    found.add_row("", f"{row['parameters']:,}", f"parameters, {row['active_parameters']:,} of them active")
    return found
