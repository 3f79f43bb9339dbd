"""One layer-wise step on a checkpoint folder: look at every block, decide, change block after block, write, read back.

Never more than two blocks' experts are in memory: the one that is read and the one that is made of it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.models.reshaped.classes import reshaped_config
from moesaic.models.reshaped.factored import LEAF, fill, install
from moesaic.store import Reader
from moesaic.store.table import Table
from moesaic.surgery.card import write_notes
from moesaic.surgery.checkpoint import Checkpoint, all_tensors, put
from moesaic.surgery.edited import edited, rest
from moesaic.surgery.layer import Change, Layer, Method
from moesaic.surgery.layout import tensors as stored_tensors
from moesaic.surgery.planning import Plan, build, check_calibration, check_needs, opened, plan_alone
from moesaic.surgery.probe import Probe, probe
from moesaic.surgery.sequential import Text, Walk, check_sequential
from moesaic.surgery.shapes import inner_of
from moesaic.surgery.shards import MADE, Shards, check_out, copy_files
from moesaic.trace.calibration.store import Calibration
from moesaic.view import View
from moesaic.view.bank import ViewBank
from moesaic.view.block import Block
from moesaic.view.resize import Resized, resize

Progress = Callable[[str, int, int], None]
"""What is done, how far, of how many."""


@dataclass
class Report:
    """What a step did. `blocks`: per block its name, expert map, scores and what else the method said."""

    family: str
    method: str
    options: dict[str, Any]
    seconds: float
    bytes_before: int
    bytes_after: int
    read_bytes: int
    stock: bool
    blocks: list[dict[str, Any]]


def operate(
    path: str | Path,
    out: str | Path,
    family: str,
    name: str,
    options: dict[str, Any] | None = None,
    *,
    calibration: Calibration | None = None,
    sequential: Text | None = None,
    domain: str | None = None,
    resume: bool = False,
    history: Sequence[dict[str, Any]] = (),
    progress: Progress = lambda what, done, total: None,
    **how: Any,
) -> Report:
    """Run one layer-wise method on the checkpoint `path` and write the result to `out`.

    Args:
        calibration: statistics of this very model; methods say by their registration what they need.
        sequential: in place of statistics the text, on which every block is measured with those before it already changed.
        domain: read them for one domain only.
        resume: go on with a surgery to the same `out` that was broken off.
        history: what was done to the model before, for the result's `surgery.json`.

    Raises BadInput for what cannot apply, before anything is written; ReadFailed; the input is never touched.
    """
    began, out, options = time.perf_counter(), Path(out), dict(options or {})
    entry, method = build(family, name, options)
    if sequential is None:
        check_needs(entry, calibration)
    with Reader("drop" if sequential is None else "keep") as reader:
        checkpoint, walk = Checkpoint(path, reader, **how), None
        if sequential is not None:
            check_sequential(entry, method, checkpoint.model)
            walk = Walk(path, reader, sequential, entry.needs, **how)
        elif calibration is not None:
            check_calibration(calibration, checkpoint)
        plan = plan_alone(opened(checkpoint), entry, method, options)
        check_out(out, checkpoint.folder, plan.bytes_after + (0 if walk is None else walk.disk_bytes))
        work = _Step(checkpoint, method, calibration, walk, domain, progress)
        blocks = work.run(out, plan, resume, list(history))
        size, read = work.bytes_after, reader.counters.bytes
    return Report(family, name, options, time.perf_counter() - began, plan.bytes_before, size, read, plan.stock, blocks)


class _Step:
    """The passes over the blocks of one step."""

    def __init__(
        self, checkpoint: Checkpoint, method: Method, calibration: Calibration | None, walk: Walk | None, domain: str | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.checkpoint, self.method, self.progress = checkpoint, method, progress
        self.calibration, self.walk, self.domain = calibration, walk, domain
        self.bytes_after = 0

    stock = True

    def run(self, out: Path, plan: Plan, resume: bool, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made_of = {
            "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self.checkpoint.table.files],
            "step": [plan.family, plan.method, plan.options, self.domain],
            "calibration": self.calibrated,
        }  # fmt: skip
        count, self.stock = len(self.checkpoint.facts), plan.stock
        decisions = self._decide(range(count)) if self.walk is None else None
        resized = self.checkpoint.sized(plan.experts[0])
        shards = Shards(out, self.checkpoint.folder, made_of, count + 1, resume)
        self._others(shards)
        left = [i for i in range(count) if not shards.done(i + 1)]
        if self.walk is not None:
            self.walk.begin(shards.partial, left[0] if left else count)
        for i in left:
            resized = self._block(i, self._measured(i) if decisions is None else decisions[i], resized, shards)
            self.progress("writing", i + 1, count)
        if self.walk is not None:
            self.walk.end()
        notes = [shards.notes(i + 1) for i in range(count)]
        copy_files(self.checkpoint.folder, shards.partial, leave=(MADE, "surgery.json", "README.md"))
        inner = notes[0]["inner"]
        if inner != self.checkpoint.facts[0].inner:
            resized = self.checkpoint.sized(plan.experts[0], inner)
        config = resized.config
        if not self.stock:
            specs = {facts.name: note["spec"] for facts, note in zip(self.checkpoint.facts, notes, strict=True)}
            config = reshaped_config(resize(self.checkpoint.alike, inner=inner).config, specs)
        config.save_pretrained(shards.partial)
        self.bytes_after = shards.index()
        self._read_back(shards, [Probe(**note["probe"]) for note in notes])
        blocks = [note["block"] for note in notes]
        step = {
            "family": plan.family, "method": plan.method, "options": plan.options, "bytes_before": plan.bytes_before,
            "bytes_after": self.bytes_after, "stock": plan.stock, "calibration": self.calibrated, "blocks": blocks,
        }  # fmt: skip
        write_notes(shards.partial, plan.source.name, [*history, step])
        shards.finish()
        return blocks

    @property
    def calibrated(self) -> dict[str, Any] | None:
        """What statistics were read, in words."""
        if self.walk is not None:
            return {
                "sequential": True, "text": list(self.walk.header.sources), "tokens": self.walk.tokens, "hash": self.walk.hash,
                "tiers": list(self.walk.tiers), "domain": self.domain,
            }  # fmt: skip
        if self.calibration is None:
            return None
        header = self.calibration.header
        return {
            "folder": str(self.calibration.folder), "text": list(header.sources), "tokens": header.progress["tokens"],
            "hash": self.calibration.hash, "tiers": list(header.tiers), "domain": self.domain,
        }  # fmt: skip

    def layer(self, i: int) -> Layer:
        """Block i for the method; its weights come into memory when they are first looked at."""
        facts, found = self.checkpoint.facts[i], self.calibration
        statistics = by_domain = features = None
        if found is not None:
            statistics = found.layer(i, self.domain)
            by_domain = {name: found.layer(i, name) for name in found.header.domains}
            if "C" in found.header.tiers:
                features = lambda: tuple(torch.from_numpy(side) for side in found.features(i))  # noqa: E731
        return Layer(facts, self.checkpoint.view[i], statistics, by_domain, features)  # type: ignore[arg-type]

    def _decide(self, blocks: Sequence[int]) -> list[Any]:
        """One decision for each of these blocks, which are all that are looked at."""
        looks, count = [], len(self.checkpoint.facts)
        for i in blocks:
            with self.checkpoint.lazily(i):
                looks.append(self.method.look(self.layer(i)))
            self.progress("looking", i + 1, count)
        return self.method.decide(looks, [self.checkpoint.facts[i] for i in blocks])

    def _measured(self, i: int) -> Any:
        """The decision for block i, by statistics that are taken now, behind the blocks already changed."""
        assert self.walk is not None
        self.calibration = self.walk.measure(i, self._calibrating)
        return self._decide([i])[0]

    def _calibrating(self, done: int, total: int) -> None:
        self.progress("calibrating", done, total)

    def _others(self, shards: Shards) -> None:
        """The shard of all that is in no block, as it is stored."""
        if shards.done(0):
            return
        of_blocks = {name for names in self.checkpoint.of_block for name in names}
        kept: list[tuple[str, Any]] = []
        for name, other in self.checkpoint.others.items():
            if name in of_blocks:
                continue
            if self.stock:
                kept += [(stored.name, stored) for ranges in other.lists.values() for stored in ranges]
            elif other.rule is None:
                kept.append((name, other.stored))
            else:
                kept += other.read(self.checkpoint.model, self.checkpoint.reader).items()
        shards.copy(0, kept, self.checkpoint.reader)

    def _block(self, i: int, decision: Any, resized: Resized, shards: Shards) -> Resized:
        """Change, probe and write one block; the skeleton of the new sizes, which the first block may have narrowed."""
        with self.checkpoint.lazily(i):
            layer = self.layer(i)
            change: Change = self.method.change(layer, decision)
            change.check(layer.facts)
            matrix = None if change.matrix_RD is None else self.checkpoint.name_of(layer.router_matrix())
        facts, inner = layer.facts, layer.facts.inner
        whole = change.through(self._map(i))
        del layer  # and what the method keeps on it
        if change.experts:
            inner = next(iter(change.experts.values()))["down"].shape[1]
        blank = View(resized.model)[i]
        if inner != inner_of(blank) or len(change.keep) != blank.num_experts:
            resized = self.checkpoint.sized(len(change.keep), inner)
            blank = View(resized.model)[i]
        if change.form:
            made, seen = self._factored(i, whole, blank, matrix)
        else:
            made = edited(self.checkpoint, i, whole, blank, matrix)
            with put(resized.model, made):
                seen = probe(blank, made)
        if self.walk is not None:
            self.walk.go_on(i, change, made, self._calibrating)
        report = {
            "name": facts.name,
            "layer": facts.layer,
            "module": self.checkpoint.matrices[i][0].rpartition(".")[0],
            "experts_before": facts.experts,
            "experts_after": len(change.keep),
            "expert_map": change.expert_map(facts.experts),
            "scores": None if change.scores is None else change.scores.double().tolist(),
            **change.report,
        }
        notes = {"probe": seen._asdict(), "block": report, "inner": inner, "spec": _spec(whole), "names": list(made)}
        shards.write(i + 1, self._as_stored(i, made), notes, self.checkpoint.reader)
        if self.walk is not None:
            self.walk.leave(i)
        return resized

    def _map(self, i: int) -> list[int] | None:
        """Expert of each router row of block i, where several may run one."""
        held_R = self.checkpoint.view[i].row_map
        return None if held_R is None else held_R.tolist()

    def _factored(self, i: int, change: Change, blank: Block, matrix: str | None) -> tuple[dict[str, Tensor], Probe]:
        """The tensors of a block whose experts become factors, and what it says with them."""
        prefix = self.checkpoint.matrices[i][0].rpartition(".")[0]
        made = rest(self.checkpoint, i, change, matrix)
        experts = copy.deepcopy(blank.experts)
        factors = install(experts, change.form)
        fill(factors, change.bank)
        for name, tensor in made.items():  # biases
            if name.startswith(prefix + "."):
                setattr(experts, name.removeprefix(prefix + "."), nn.Parameter(tensor, requires_grad=False))
        made |= {f"{prefix}.{LEAF}.{name}": tensor.detach().cpu() for name, tensor in all_tensors(factors).items()}
        parent = copy.copy(blank)
        parent.experts, parent.bank = experts, ViewBank(parent)
        return made, probe(parent, made)

    def _as_stored(self, i: int, made: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        if not self.stock:  # the class that loads it has stacked experts and names of its own
            return list(made.items())
        matrices = self.checkpoint.matrices[i]
        found: list[tuple[str, Tensor]] = []
        for name, source in zip(matrices, self.checkpoint.sources[i], strict=True):
            found += stored_tensors(source, made[name])
        for name, tensor in made.items():
            if name not in matrices:
                stored = self.checkpoint.others[name].stored
                found.append((stored.name, tensor.to(stored.dtype)))
        return found

    def _read_back(self, shards: Shards, probes: list[Probe]) -> None:
        """Open the written folder as any checkpoint and have every block say what it said in memory."""
        if any(shards.notes(i + 1)["spec"].get("form") for i in range(len(probes))):
            self._read_factors_back(shards, probes)
            return
        with Reader("drop") as reader:
            written = Checkpoint(shards.partial, reader)
            for i, expected in enumerate(probes):
                with written.block(i) as block:
                    names = [*written.matrices[i], *written.of_block[i]]
                    own = all_tensors(written.model)
                    found = probe(block, {name: own[name] for name in names if not own[name].is_meta})
                self._agree(shards, block, found, expected)
                self.progress("reading back", i + 1, len(probes))

    def _read_factors_back(self, shards: Shards, probes: list[Probe]) -> None:
        """The same where parameters are stored by their own names."""
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shards.partial))
        table = Table.of_folder(shards.partial)
        with Reader("drop") as reader:
            for i, (block, expected) in enumerate(zip(View(model), probes, strict=True)):
                tensors = {name: reader.read(table[name]) for name in shards.notes(i + 1)["names"]}
                with put(model, tensors):
                    self._agree(shards, block, probe(block, tensors), expected)
                self.progress("reading back", i + 1, len(probes))

    def _agree(self, shards: Shards, block: Block, found: Probe, expected: Probe) -> None:
        if found != expected:
            raise BadInput(
                f"{shards.partial}: {block.name} read back from disk differs from the one in memory ({found} and "
                f"{expected}); the result is not to be trusted, and OUT was not made"
            )


def _spec(change: Change) -> dict[str, Any]:
    """What the class that loads a model of unequal blocks must know of one."""
    rows = None if change.row_to_expert is None else [int(e) for e in change.row_to_expert]
    own = rows == list(range(len(change.keep)))
    found = {"experts": len(change.keep), "rows": len(change.row_ids), "map": None if own else rows}
    return found | ({"form": change.form} if change.form else {})
