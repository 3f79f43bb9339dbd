"""Surgery in memory: measure a live model, change it in place, and the methods that must measure again in between.

The out-of-core run looks at every layer once, on statistics of the untouched model. Two published procedures cannot: a
progressive one calibrates a layer with the layers before it already changed (out of core: surgery/sequential.py), an iterative
one drops a few experts per round and measures anew. Both are here, for any method. Shape legend: B batch, N tokens of a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.apply import apply
from moesaic.surgery.layer import Change, Facts, Layer, Method, count_kept
from moesaic.surgery.reconstruct import never_chosen
from moesaic.surgery.shapes import facts_of
from moesaic.trace import corpus
from moesaic.trace.calibration.backward import Backward
from moesaic.trace.calibration.collect import Collector
from moesaic.trace.calibration.store import LayerStatistics, added
from moesaic.trace.calibration.tiers import parse
from moesaic.trace.segments import read
from moesaic.view.block import View


def measure(
    model: Any, batches: Iterable[Tensor], tiers: str | tuple[str, ...] = "R0,R1", only: Sequence[int] | None = None
) -> list[Layer]:
    """The blocks of a live model (or those numbered in `only`), each with the statistics of these ids [B, N].

    Tier C is kept in memory: T D values of each block twice.
    """
    blocks, wanted = View(model), parse(tiers)
    numbers = list(range(len(blocks))) if only is None else list(only)
    forward, ids = [tier for tier in wanted if tier != "B"], [batch.reshape(-1, batch.shape[-1]) for batch in batches]
    parts: dict[str, list[Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features"
        with path.open("wb") as stream:
            collector = Collector(blocks, forward, numbers, features=stream if "C" in forward else None)
            with collector:
                for ids_BN in ids if forward else ():
                    corpus.forward(model, ids_BN, torch.ones_like(ids_BN))
                    collector.end_batch()
        if "C" in forward:
            for segment in read(path).found:
                for name, values in segment.columns.items():
                    parts.setdefault(name, []).append(torch.from_numpy(values.copy()))
    features = {name: torch.cat(mine) for name, mine in parts.items()}
    sums = {number: added(collector.sums[number].values()) for number in numbers}
    if "B" in wanted:
        with Backward(blocks, numbers) as backward:
            for row_N in (row for ids_BN in ids for row in ids_BN):
                backward.step(row_N)
        sums = {number: sums[number] | backward.sums[number] for number in numbers}
    facts = facts_of(blocks)
    return [
        Layer(facts[n], blocks[n], LayerStatistics(sums[n]), features=_kept(features, n) if "C" in wanted else None)
        for n in numbers
    ]


def _kept(features: dict[str, Tensor], number: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (features[f"{number}.input"], features[f"{number}.output"])


def operate(method: Method, layers: Sequence[Layer]) -> list[Change]:
    """The method's changes to these blocks, applied in place as each is made."""
    facts = [layer.facts for layer in layers]
    method.plan(facts)
    decisions = method.decide([method.look(layer) for layer in layers], facts)
    changes = []
    for layer, decision in zip(layers, decisions, strict=True):
        changes.append(method.change(layer, decision))
        apply(layer.block, changes[-1], layer.facts)
    return changes


def progressively(
    model: Any, make: Callable[[], Method], batches: Sequence[Tensor], tiers: str | tuple[str, ...] = "R0,R1,C"
) -> list[Change]:
    """One block after another, each measured with those before it already changed; a method that ranks over the whole
    model is asked about one block at a time. As many forward passes as blocks.
    """
    found: list[Change] = []
    for number in range(len(View(model))):
        found += operate(make(), measure(model, batches, tiers, only=[number]))
    return found


def in_rounds(
    model: Any,
    make: Callable[[int], Method],
    batches: Sequence[Tensor],
    keep: float | int,
    share: float = 0.125,
    tiers: str | tuple[str, ...] = "R0,R1",
    between: Callable[[Any, int], None] | None = None,
) -> list[list[int]]:
    """Prune in rounds of `share` of the original experts, measuring anew before each; kept ids of each block, as of the start.

    Args:
        make: the method for a number of experts to keep in every block.
        keep: experts that stay in the end: a share, or a number per block.
        between: called with the model and the round's number after each round, to tune it a little.
    """
    if not 0 < share <= 1:
        raise BadInput(f"share {share}: a part of the experts above 0 and at most 1")
    start = facts_of(View(model))
    counts = {facts.experts for facts in start}
    if len(counts) > 1:
        raise BadInput(f"rounds: the blocks have {sorted(counts)} experts; prune in rounds needs as many in each")
    kept = [list(range(facts.experts)) for facts in start]
    for number, count in enumerate(round_sizes(start[0], keep, share)):
        changes = operate(make(count), measure(model, batches, tiers))
        kept = [[mine[e] for e in change.keep] for mine, change in zip(kept, changes, strict=True)]
        if between is not None:
            between(model, number)
    return kept


def round_sizes(facts: Facts, keep: float | int, share: float) -> list[int]:
    """Experts that stay after each round: `share` of the first number fewer each time, down to the number asked for.

    Group-limited routers lose at least one expert per group and round.
    """
    last, step = count_kept(facts, keep), max(1, round(facts.experts * share))
    step = -(-step // facts.groups) * facts.groups
    return [*range(facts.experts - step, last, -step), last] if last < facts.experts else []


@torch.no_grad()
def loss(model: Any, batches: Iterable[Tensor]) -> float:
    """Mean next-token cross-entropy over these ids, in nats."""
    total, count = 0.0, 0
    for ids_BN in batches:
        logits = model(input_ids=ids_BN, use_cache=False).logits[:, :-1].float()
        target = ids_BN[:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum"))
        count += target.numel()
    return total / max(count, 1)


def masked_losses(model: Any, batches: Sequence[Tensor]) -> list[float]:
    """For each block, the mean rise of the model's loss when one of its experts cannot be chosen (MoE-I2's importance; a
    block whose experts all help by chance less than nothing counts 0). A pass over the ids for every expert of the model.
    """
    blocks, before = View(model), loss(model, batches)
    found = []
    for block in blocks:
        rises = []
        for e in range(block.num_experts):
            rises.append(_without(blocks, {block.name: [e]}, lambda: loss(model, batches)) - before)
        found.append(max(sum(rises) / len(rises), 0.0))
    return found


def best_combination(
    model: Any, batches: Sequence[Tensor], candidates: Sequence[Sequence[Sequence[int]]], window: int = 2
) -> list[list[int]]:
    """Among sets of experts to drop (some per block, best first), those that together move the model's output least.

    Windows of `window` consecutive blocks are settled one after another, the ones before as they were settled; the error is
    that of the final logits, the least of all combinations in the window.
    """
    blocks = View(model)
    if len(candidates) != len(blocks) or not all(candidates):
        raise BadInput(f"candidates: at least one set for each of the {len(blocks)} MoE blocks")
    clean = [_logits(model, ids_BN) for ids_BN in batches]
    settled: dict[str, list[int]] = {}
    for start in range(0, len(blocks), window):
        names = [block.name for block in blocks[start : start + window]]
        tried = []
        for chosen in product(*candidates[start : start + window]):
            without = settled | {name: list(dropped) for name, dropped in zip(names, chosen, strict=True)}
            found = _without(blocks, without, lambda: [_logits(model, ids_BN) for ids_BN in batches])
            tried.append((sum(float((new - z).norm()) for new, z in zip(found, clean, strict=True)), without))
        settled = min(tried, key=lambda one: one[0])[1]
    return [settled[block.name] for block in blocks]


def _without(blocks: View, gone: Mapping[str, Sequence[int]], run: Callable[[], Any]) -> Any:
    """What `run` gives while these experts, by block name, cannot be chosen."""
    count = {block.name: block.num_experts for block in blocks}
    low = {name: never_chosen(dropped, count[name]).logits for name, dropped in gone.items()}
    without = {name: list(dropped) for name, dropped in gone.items()}
    try:
        with blocks.policy(without=without, logits=low):
            return run()
    except BadInput:  # routers whose selection is seen in their logits alone
        with blocks.policy(without=without):
            return run()


@torch.no_grad()
def _logits(model: Any, ids_BN: Tensor) -> Tensor:
    return model(input_ids=ids_BN, use_cache=False).logits.double()
