"""Ways to make a model fit: keep it, stream it, drop or merge experts, fewer bits; what each would take, before it is tried.

Sizes are exact. Speed is bytes over bandwidth: what a token reads from memory, and what of it a cache of the most used
experts misses and reads from disk. Quality is never predicted, only measured. L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.surgery.layer import Facts

KEEPS = (0.75, 0.5, 0.25)
BITS = (8, 4, 2)
MIXED = (3,)
"""Mean bits of plans in which each expert has its own width, by what it weighs and what rounding does to it (PMQ)."""

SCALE_BITS = 16 / 64
"""Bits per weight that the scales of groups of 64 add."""

LAYER_SECONDS = {False: 5e-4, True: 1e-3}
"""Of a token and layer beside moving bytes, resident and streamed: what small models are bound by (2-core Zen 4)."""

LEAST_CACHE = 0.02
"""Share of the experts that must be resident for streaming to be worth a trial."""


class Machine(NamedTuple):
    """Bytes per second."""

    memory: float
    disk: float


@dataclass(frozen=True)
class Candidate:
    """One way. `keep`: share of experts that stay; `bits`: of their weights; `resident`: share of expert bytes in memory."""

    method: str = ""
    """"" keeps all experts; else "prune reap", "merge m_smoe" or "compress neurons"."""
    keep: float = 1.0
    bits: float = 16
    resident: float = 1.0
    memory_bytes: int = 0
    """Weights in memory: what is no expert, and the resident experts."""
    expert_bytes: int = 0
    predicted: float = 0.0
    """Tokens per second."""
    scope: str = "uniform"
    """Of pruning: "global" ranks the experts of the whole model, so that layers keep unequal numbers (`import moesaic`)."""

    @property
    def exact(self) -> bool:
        return not self.method and self.bits >= 16

    @property
    def name(self) -> str:
        scope = " over all layers" if self.scope == "global" else ""
        words = [f"{self.method}{scope} to {self.keep:.0%}"] if self.method else []
        words += [f"{self.bits:g} bits" + (" on average" if self.bits in MIXED else "")] if self.bits < 16 else []
        words += ["streamed"] if self.resident < 1 else []
        return ", ".join(words) or "as it is"

    @property
    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {"keep": self.keep}
        if self.method.startswith("merge"):
            found |= {"router": "collapse", "scope": self.scope}
        elif self.scope != "uniform":
            found["scope"] = self.scope
        return found

    @property
    def label(self) -> str:
        """Of the folder that it is built in, before any packing."""
        return f"{self.method.split()[1]}{'-global' * (self.scope == 'global')}-{self.keep:g}" if self.method else "whole"


@dataclass(frozen=True)
class Model:
    """What is known of a model and a text: sizes, and how often each expert was chosen."""

    facts: Sequence[Facts]
    other_bytes: int
    counts: Sequence[Tensor] = field(default_factory=list)
    """[E] per layer."""
    item_bits: int = 16
    """Of a weight as the checkpoint has it."""

    @property
    def expert_bytes(self) -> int:
        return sum(f.experts * f.expert_bytes for f in self.facts)

    def share(self, bits: float) -> float:
        """Of an expert's bytes when its weights have so many bits; 16 leaves them as they are."""
        return 1.0 if bits >= 16 else (bits + SCALE_BITS) / self.item_bits


def candidates(model: Model, machine: Machine, memory: int, lossy: bool = True) -> list[Candidate]:
    """Every plan whose weights fit `memory`, fastest first by prediction; only exact ones without `lossy`."""
    ways: list[tuple[str, float, float, str]] = [("", 1.0, 16, "uniform")]
    if lossy:
        ways += [("", 1.0, bits, "uniform") for bits in (*BITS, *MIXED)]
        for keep in KEEPS:
            if all(max(f.least, 1) <= round(f.experts * keep) and round(f.experts * keep) % f.groups == 0 for f in model.facts):
                ways += [("prune reap", keep, bits, "uniform") for bits in (16, 8, 4, *MIXED)]
                if len(model.facts) > 1:
                    ways += [("prune reap", keep, bits, "global") for bits in (16, 8, 4)]
                ways += [("merge m_smoe", keep, bits, "uniform") for bits in (16, 4)]
            ways += [("compress neurons", keep, bits, "uniform") for bits in (16, 4)]
    found = []
    for method, keep, bits, scope in ways:
        size = round(model.expert_bytes * keep * model.share(bits))
        resident = min(1.0, (memory - model.other_bytes) / size)
        if resident < LEAST_CACHE:
            continue
        held = model.other_bytes + round(resident * size)
        made = Candidate(method, keep, bits, resident, held, size, scope=scope)
        found.append(replace(made, predicted=predict(model, machine, made)))
    return sorted(found, key=lambda each: -each.predicted)


def predict(model: Model, machine: Machine, plan: Candidate) -> float:
    """Tokens per second of decoding at batch 1."""
    width = model.share(plan.bits)
    if plan.method == "compress neurons":  # every expert is smaller, also those that run
        width *= plan.keep
    active = sum(f.top_k * f.expert_bytes for f in model.facts) * width
    missed = 0.0
    if plan.resident < 1:
        for number, f in enumerate(model.facts):
            missed += f.top_k * f.expert_bytes * width * (1 - hits(model, number, plan))
    own = len(model.facts) * LAYER_SECONDS[plan.resident < 1]
    return 1 / (own + (active + model.other_bytes) / machine.memory + missed / machine.disk)


def hits(model: Model, number: int, plan: Candidate) -> float:
    """Share of a layer's choices that fall on its most used experts, as many as the plan holds."""
    facts = model.facts[number]
    count = facts.experts if plan.method == "compress neurons" else round(facts.experts * plan.keep)
    held = plan.resident * count
    if not len(model.counts):
        return plan.resident
    used = model.counts[number].double().sort(descending=True).values[:count]
    share = torch.cat([torch.zeros(1, dtype=torch.float64), used.cumsum(0) / used.sum().clamp(min=1)])
    low = min(int(held), count)
    high = min(low + 1, count)
    return float(share[low] + (held - low) * (share[high] - share[low]))


def promising(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """At most so many plans worth a trial: all exact ones, then of each method the one that keeps most, then the fastest."""
    chosen = [each for each in found if each.exact]
    groups: dict[tuple[str, bool], list[Candidate]] = {}
    for each in found:
        if not each.exact:
            name = f"{each.method} {each.scope}" if each.method else "mixed" if each.bits in MIXED else ""
            groups.setdefault((name, each.resident < 1), []).append(each)
    for _, group in sorted(groups.items(), key=lambda item: item[0][1]):  # resident ones first
        chosen.append(max(group, key=lambda each: (each.keep * each.bits, each.predicted)))
    for each in found:
        if each not in chosen:
            chosen.append(each)
    return sorted(chosen[: max(most, sum(each.exact for each in found))], key=lambda each: -each.predicted)


def pareto(rows: Sequence[dict[str, Any]]) -> list[bool]:
    """Which measured plans no other one beats in memory, speed and bits per byte at once."""

    def beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
        pairs = [(a["memory_bytes"], b["memory_bytes"]), (-a["tokens_per_second"], -b["tokens_per_second"]),
                 (a["bits_per_byte"], b["bits_per_byte"])]  # fmt: skip
        return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)

    return [not any(beats(other, row) for other in rows) for row in rows]


def choose(rows: Sequence[dict[str, Any]], quality: float | None) -> int | None:
    """The fastest measured plan that is exact or, with `quality`, costs at most that share more bits per byte than the model.

    None where there is none: nothing lossy is ever chosen unasked.
    """
    base = min((row["bits_per_byte"] for row in rows if row["exact"]), default=None)
    fits = [
        i for i, row in enumerate(rows)
        if row["exact"] or (quality is not None and base is not None and row["bits_per_byte"] <= base * (1 + quality))
    ]  # fmt: skip
    return max(fits, key=lambda i: rows[i]["tokens_per_second"], default=None)
