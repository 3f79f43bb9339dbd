"""`moesaic bench decode`: a whole model in memory, prompt and decoding, ours beside transformers and llama.cpp.

Each contestant is a process of its own with the same checkpoint, and they take turns. All are fed the same tokens, so
nobody's sampling counts, and their most probable next tokens must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from moesaic.bench import generated, machine
from moesaic.bench.contestants.process import Contestant, has_llama_cpp, llama_command, model_command, write_gguf
from moesaic.bench.runner import summary
from moesaic.bench.token_stream import tokens
from moesaic.core.errors import BadInput
from moesaic.view.quantize import parse


@dataclass
class Options:
    """`peers`: which contestants, see `commands`. `folder` holds the checkpoints, written once."""

    folder: Path
    size: str = "1.3b"
    peers: tuple[str, ...] = (
        "moesaic", "moesaic int8:linear=8", "moesaic int4:linear=4", "moesaic int4", "grouped_mm", "eager",
        "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0",
    )  # fmt: skip
    threads: int = 2
    prompt: int = 256
    steps: int = 32
    rounds: int = 5
    llama_python: str = "python3"

    def check(self) -> None:
        if self.size not in generated.SIZES:
            raise BadInput(f"--size {self.size!r}: one of {', '.join(generated.SIZES)}")
        for name, least in (("prompt", 1), ("steps", 1), ("rounds", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise BadInput(f"--{name} {getattr(self, name)}: give at least {least}")


def commands(options: Options, folder: Path, notes: list[str]) -> dict[str, list[str]]:
    """The command line of every contestant that can run here; a note for each that cannot. Raises BadInput for a name."""
    found: dict[str, list[str]] = {}
    why = has_llama_cpp(options.llama_python) if any(name.startswith("llama") for name in options.peers) else None
    if why:
        notes.append(why)
    for name in options.peers:
        kind, _, form = name.partition(" ")
        if kind == "moesaic":
            found[name] = model_command(folder, options.threads, "moesaic", **({"quantize": form} if form else {}))
        elif name in ("eager", "grouped_mm"):
            found[f"transformers {name}"] = model_command(folder, options.threads, "transformers", experts=name)
        elif kind == "llama.cpp" and form in ("BF16", "Q8_0", "Q4_0"):
            if not why:
                gguf = write_gguf(options.llama_python, folder, form)
                found[name] = llama_command(options.llama_python, gguf, options.threads)
        else:
            raise BadInput(f"--peers {name!r}: one of {', '.join(Options(Path()).peers)}")
    return found


def active_bytes(name: str, size: generated.Size) -> float:
    """Bytes that a contestant reads per token, scales included: of Q4_0 4.5 bits per weight, of our int4 4.25."""
    form = name.rpartition(" ")[2]
    experts = size.layers * size.slots * size.expert_weights
    others = size.active_weights - experts
    if form in LLAMA_BITS:
        return (experts + others) * LLAMA_BITS[form] / 8
    recipe = parse(form) if form.startswith("int") else None
    if recipe is None:
        return 2.0 * (experts + others)
    scales = 16 / recipe.group_size
    return (experts * (recipe.high + scales) + others * (16 if recipe.linear is None else recipe.linear + scales)) / 8


LLAMA_BITS = {"Q8_0": 8.5, "Q4_0": 4.5}


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Prefill and decode rows of every contestant, medians over rounds taken in turn."""
    options.check()
    size, notes = generated.SIZES[options.size], list[str]()
    folder = generated.generate(options.folder / options.size, size, progress)
    header = machine.describe("cpu")
    ids = tokens(options.prompt + options.steps)
    prefills: dict[str, list[float]] = {}
    decodes: dict[str, list[float]] = {}
    tops: dict[str, list[int]] = {}
    peaks: dict[str, int] = {}
    with ExitStack() as open_ones:
        contestants = []
        for name, command in commands(options, folder, notes).items():
            progress(f"loading {name}")
            contestants.append(open_ones.enter_context(Contestant(name, command)))
            contestants[-1].ask("prefill", ids[:8])  # compilation, first touches
            contestants[-1].ask("decode", ids[8:12])
        for number in range(options.rounds):
            for one in contestants[number % len(contestants) :] + contestants[: number % len(contestants)]:
                progress(f"round {number + 1} of {options.rounds}: {one.name}")
                prefills.setdefault(one.name, []).append(one.ask("prefill", ids[: options.prompt])["seconds"])
                reply = one.ask("decode", ids[options.prompt :])
                decodes.setdefault(one.name, []).append(median(reply["steps"]))
                peaks[one.name] = reply["peak_bytes"]
        for one in contestants:
            tops[one.name] = one.ask("facts")["top"]
    read = machine.measure(quick=True)["read_bytes_per_second"]
    rows = []
    for name in prefills:
        active = active_bytes(name, size)
        rows += [
            {"impl": name, "case": "prefill", "tokens": options.prompt,
             "tokens_per_second": options.prompt / median(prefills[name]), **summary(prefills[name])},
            {"impl": name, "case": "decode", "tokens": options.steps, "tokens_per_second": 1 / median(decodes[name]),
             **summary(decodes[name]), "read_bytes": active, "floor_seconds": active / read, "peak_bytes": peaks[name]},
        ]  # fmt: skip
    first = next(iter(tops.values()))
    notes += [
        f"{name}: its most probable next token is {top[0]}, not {first[0]}" for name, top in tops.items() if top[0] != first[0]
    ]
    return {"machine": header, "size": options.size, "rows": rows, "notes": notes, "tops": tops}
