"""What a layer-wise step will do, before it does it: which experts, sizes and class it leaves, and why it cannot apply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.store import Reader
from moesaic.surgery.checkpoint import Checkpoint
from moesaic.surgery.layer import Facts, Method
from moesaic.surgery.sequential import check_sequential
from moesaic.surgery.shapes import facts_of
from moesaic.trace.calibration.store import Calibration
from moesaic.view import View
from moesaic.view.resize import resize

LAYERWISE = ("prune", "merge", "compress", "quantize")

OURS = "needs `import moesaic` before it loads (rows share experts, blocks differ, or experts are no plain matrices)"


@dataclass
class Plan:
    """What a step will do; nothing is written yet."""

    family: str
    method: str
    options: dict[str, Any]
    source: Path
    facts: list[Facts]
    experts: list[int]
    """Of each block afterwards."""
    stock: bool
    reason: str
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    fields: dict[str, int] = field(default_factory=dict)
    model: Any = None
    """Without memory, of the architecture's own class, of the inner width that the checkpoint has."""
    after: list[Facts] = field(default_factory=list)
    """The blocks that the next step meets, as far as they are known; empty: `facts` with `experts` experts."""
    reshaped: bool = False
    """Whether the class that holds it is ours because blocks differ, share experts, or hold factors."""
    factored: bool = False
    """Whether experts are factors afterwards."""


def build(family: str, name: str, options: dict[str, Any]) -> tuple[registry.Entry, Method]:
    """A method from its options. Raises BadInput, UnknownMethod for what it does not know."""
    if family not in LAYERWISE:
        raise BadInput(f"{family}: layer-wise surgery is one of {', '.join(LAYERWISE)}")
    entry = registry.get(family, name)
    unknown = sorted(set(options) - set(entry.parameters))
    if unknown:
        raise BadInput(f"{family} {name} has no option {unknown[0]!r}; it has {', '.join(entry.parameters) or 'none'}")
    try:
        method: Method = entry.build(**options)
    except TypeError as error:
        raise BadInput(f"{family} {name}: {error}") from error
    return replace(entry, needs=entry.needs | method.needs), method


def open_plan(path: str | Path, **how: Any) -> Plan:
    """A checkpoint as it is: what the first step of a recipe meets. Raises BadInput for what surgery cannot open."""
    with Reader("keep") as reader:
        return opened(Checkpoint(path, reader, **how))


def opened(checkpoint: Checkpoint) -> Plan:
    size, facts = checkpoint.table.nbytes, checkpoint.facts
    experts = [each.experts for each in facts]
    ours = checkpoint.reshaped
    reason = OURS if ours else ""
    return Plan("", "", {}, checkpoint.folder, facts, experts, not ours, reason, size, size, 0, {}, checkpoint.alike, [], ours)


def plan_step(before: Plan, family: str, name: str, options: dict[str, Any], sequential: bool = False) -> Plan:
    """What a layer-wise step makes of what the plan before it leaves. Raises BadInput with the reason it cannot apply."""
    entry, method = build(family, name, options)
    if not before.facts:
        raise BadInput(
            f"{family} {name}: there are no experts after {before.family or 'all, in'} {before.method or 'a dense model'}"
        )
    if before.factored:
        raise BadInput(
            f"{family} {name}: {before.method} leaves experts as factors, which no method reads or rounds: do this step before "
            f"it, or give {before.method} store=dense, which multiplies them out"
        )
    if not before.stock and not before.reshaped:
        raise BadInput(f"{family} {name}: {before.method} leaves what {before.reason}; do this step before it")
    if sequential:
        check_sequential(entry, method, before.model)
    return plan_alone(before, entry, method, options)


def check_needs(entry: registry.Entry, calibration: Calibration | None) -> None:
    """Raises BadInput where a method's statistics are missing."""
    if not entry.needs:
        return
    if calibration is None:
        raise BadInput(
            f"{entry.family} {entry.name} needs calibration ({', '.join(sorted(entry.needs))}): give a text with --data, or "
            "a folder of `moesaic calibrate` with --statistics"
        )
    missing = sorted(entry.needs - set(calibration.header.tiers) - {"D"})
    if "D" in entry.needs and not calibration.header.domains:
        raise BadInput(f"{calibration.folder} keeps no domains apart, which {entry.name} reads: calibrate with --by-domain")
    if missing:
        raise BadInput(
            f"{calibration.folder} lacks {', '.join(missing)}, which {entry.family} {entry.name} reads: calibrate again "
            f"with --tiers {','.join(sorted(entry.needs | set(calibration.header.tiers)))}"
        )


def plan_alone(before: Plan, entry: registry.Entry, method: Method, options: dict[str, Any]) -> Plan:
    """What a built method makes of what the plan before it leaves, whoever loads that."""
    facts = before.after or [each._replace(experts=n) for each, n in zip(before.facts, before.experts, strict=True)]
    check_blocks(method, entry.name, facts)
    counts = method.plan(facts)
    stock, reason = method.stock and before.stock, "the architecture's own class"
    after = sum(method.bytes(each, count) for each, count in zip(facts, counts, strict=True))
    before_bytes = sum(each.experts * each.expert_bytes for each in facts)
    fields: dict[str, int] = {}
    if not stock:
        reason = OURS
    if method.stock:
        inner = method.inner(facts[0])
        sizes = {"experts": counts[0]} if stock and counts[0] != facts[0].experts else {}
        sizes |= {"inner": inner} if inner != facts[0].inner else {}
        resized = resize(before.model, **sizes) if sizes else None
        fields = resized.fields if resized is not None else {}
        reason += " with other sizes" if stock and fields else ""
        if resized is not None and "inner" in sizes:  # what a next step of a recipe meets
            news, before = facts_of(View(resized.model)), replace(before, model=resized.model)
            facts = [
                each._replace(inner=new.inner, expert_bytes=new.expert_bytes) for each, new in zip(facts, news, strict=True)
            ]
    reason += f"; {method.remark}" if method.remark else ""
    bank = max(each.experts * each.expert_bytes for each in facts)
    uneven = method.uneven or facts[0].uneven or len(set(counts)) > 1
    left = [
        each._replace(
            experts=n, uneven=uneven, shared_rows=each.rows if method.shares else each.shared_rows,
            at_least=min(n, 1 if method.shares else each.least) if method.uneven or each.at_least else 0,
        )
        for each, n in zip(facts, counts, strict=True)
    ]  # fmt: skip
    return Plan(
        entry.family, entry.name, options, before.source, facts, counts, stock, reason, before.bytes_after,
        before.bytes_after - before_bytes + after, 2 * bank, fields, before.model, left, not stock, method.factors,
    )  # fmt: skip


def check_blocks(method: Method, name: str, facts: Sequence[Facts]) -> None:
    """Raises BadInput for a method that cannot work on blocks whose rows share experts, or differ in number."""
    for each in facts:
        if each.shared_rows and method.reads_rows:
            raise BadInput(
                f"{name}: it reads a router row of every expert, and those of {each.name} share experts: do this before them, "
                "or choose a method (or router=map) that leaves rows as they are"
            )
        if each.shared_rows and each.groups > 1 and method.drops:
            raise BadInput(
                f"{name}: the rows of {each.name} share experts across its router's groups, and without some of them groups "
                "would be unequal: drop experts before they are merged"
            )


def check_calibration(calibration: Calibration, checkpoint: Checkpoint) -> None:
    known = [(layer.experts, layer.name) for layer in calibration.header.layers]
    for facts, (experts, name) in zip(checkpoint.facts, known, strict=False):
        if facts.experts != experts or facts.name != name:
            raise BadInput(
                f"{calibration.folder} is of a model with {experts} experts in {name}; {facts.name} has {facts.experts}: "
                "calibrate the model that is operated on"
            )
    if len(known) != len(checkpoint.facts):
        raise BadInput(f"{calibration.folder} is of {len(known)} blocks, the model has {len(checkpoint.facts)}")
