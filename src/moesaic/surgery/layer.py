"""What a surgery sees of one MoE block, and how it says what shall stand in its place.

A method looks at every layer, decides once for all of them, and then changes layer after layer; no two layers are in memory
at the same time. What it returns is a `Change`: which experts stay byte for byte, which are new, what the router becomes.
Shape legend: E experts, F experts afterwards, R router rows afterwards, D model width, I expert inner width, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.trace.calibration.store import LayerStatistics
from moesaic.view.bank import ExpertWeights
from moesaic.view.block import Block

if TYPE_CHECKING:
    from moesaic.surgery.objective import Objective


class Facts(NamedTuple):
    """A block by its numbers: known before a weight is read."""

    number: int
    """Among the MoE blocks of the model; `layer` is the decoder layer it stands in."""
    name: str
    layer: int
    experts: int
    top_k: int
    groups: int
    """Of experts among which a group-limited router chooses `chosen_groups`; 1 where it does not."""
    chosen_groups: int
    width: int
    inner: int
    expert_bytes: int
    blocks: int
    """MoE blocks in the model."""
    shared_rows: int = 0
    """Rows of a router several of which run one expert; 0 where every expert has one of its own."""
    uneven: bool = False
    """Whether the model's blocks differ in experts."""
    at_least: int = 0
    """Before a step of a recipe has run that says by statistics how many stay: the fewest that may, where `experts` is the
    mean; 0 where `experts` is known."""

    @property
    def fewest(self) -> int:
        """Experts that it has for sure."""
        return self.at_least or self.experts

    @property
    def rows(self) -> int:
        """R: what the router chooses among."""
        return self.shared_rows or self.experts

    @property
    def least(self) -> int:
        """The fewest experts with which the router still works: k of them in the groups it may choose from, in equal groups.

        Group-limited routers score a group by its two best experts, so each keeps two.
        """
        if self.groups == 1:
            return self.top_k
        each = max(2, -(-self.top_k // self.chosen_groups))
        return each * self.groups


class Layer:
    """One block with its weights in memory, and what calibration said of it."""

    def __init__(
        self,
        facts: Facts,
        block: Block,
        statistics: LayerStatistics | None = None,
        by_domain: Mapping[str, LayerStatistics] | None = None,
        features: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.facts, self.block = facts, block
        self._statistics, self.by_domain, self._features = statistics, dict(by_domain or {}), features

    @property
    def statistics(self) -> LayerStatistics:
        """Raises BadInput where the surgery has none."""
        if self._statistics is None:
            raise BadInput(f"{self.facts.name}: this method reads calibration: name a text (--data) or a folder (--statistics)")
        return self._statistics

    @property
    def has_features(self) -> bool:
        return self._features is not None

    def features(self) -> tuple[Tensor, Tensor]:
        """Tier C: what entered the block and what its routed experts gave, float32 [T, D] each. Raises BadInput for none."""
        if self._features is None:
            raise BadInput(f"{self.facts.name}: this method reads features: calibrate with tier C")
        return self._features()

    def expert(self, e: int) -> ExpertWeights:
        """A float32 copy of expert e: gate [I, D], up [I, D], down [D, I], and biases where there are any."""
        return self.block.bank.peek(e).map(lambda tensor: tensor.detach().float())

    def run(self, e: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert e on rows x as the model computes it: inner activations [T, I] and outputs [T, D]."""
        with torch.no_grad():
            return self.block.bank.run_one(e, x_TD)

    @cached_property
    def rows_ED(self) -> Tensor:
        """The router's rows, float32 copies. Raises BadInput for a router that is no matrix with a row per expert."""
        return self.router_matrix().detach().float().clone()

    def router_matrix(self) -> Tensor:
        """The parameter itself."""
        E, router = self.facts.experts, self.block.router
        own = [] if router is None else [p for p in router.parameters() if p.dim() == 2 and p.shape == (E, self.facts.width)]
        if len(own) != 1:
            raise BadInput(f"{self.facts.name}: its router is no matrix with a row per expert, and this method reads rows")
        return own[0]


@dataclass
class Change:
    """What stands in a block afterwards.

    Attributes:
        keep: for each expert afterwards [F], the expert whose weights it has, byte for byte unless it is in `experts`.
        experts: new weights of some, by their number afterwards, all of one inner width; named as in `Layer.expert`.
        rows: for each router row afterwards [R], the row it is a copy of; `keep` by default.
        matrix_RD: new rows of the router's matrix, float32, where they are no copies.
        mix_RE: for each router row afterwards, weights over the rows before: what every other per-expert tensor of the router
            (bias, correction bias, scale) becomes, mix @ tensor; copies of `rows` by default.
        shift_R: added to the bias that stands beside the router's matrix, where there is one.
        row_to_expert: for each router row the expert (afterwards) that it runs; None: its own, and then R = F.
        scores: what was decided by, [E], for the report; lower goes first.
        report: more of it, in plain numbers and lists.
        form, bank: what stands for the matrices of all experts where they are factors: the form of
            `models/reshaped/factored.py`, and its tensors by name. No experts come or go then.
    """

    keep: Sequence[int]
    experts: dict[int, ExpertWeights] = field(default_factory=dict)
    rows: Sequence[int] | None = None
    matrix_RD: Tensor | None = None
    mix_RE: Tensor | None = None
    shift_R: Tensor | None = None
    row_to_expert: Sequence[int] | None = None
    scores: Tensor | None = None
    report: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)
    bank: dict[str, Tensor] = field(default_factory=dict)

    @property
    def row_ids(self) -> list[int]:
        return list(self.keep if self.rows is None else self.rows)

    def expert_map(self, experts: int) -> list[int]:
        """For each expert before, the one that now runs for its router row; -1 where the row is gone."""
        found = [-1] * experts
        runs = range(len(self.row_ids)) if self.row_to_expert is None else self.row_to_expert
        for row, expert in zip(self.row_ids, runs, strict=True):
            found[row] = int(expert)
        for e, went in enumerate(self.report.get("merged_into", ())):
            found[e] = int(went)
        return found

    def through(self, held_R: Sequence[int] | None) -> Change:
        """This change, made for a router with a row per expert, for one whose rows run the experts `held_R`.

        Rows go where their expert goes, and stay as they are; whoever shared an expert goes on sharing it.
        """
        if held_R is None:
            return self
        if self.matrix_RD is not None or self.mix_RE is not None or self.shift_R is not None:
            raise ValueError("new router rows for a router whose rows share experts")
        runs = range(len(self.row_ids)) if self.row_to_expert is None else self.row_to_expert
        new = dict(zip(self.row_ids, runs, strict=True))
        rows = [row for row, e in enumerate(held_R) if e in new]
        return replace(self, rows=rows, row_to_expert=[int(new[held_R[row]]) for row in rows])

    def check(self, facts: Facts) -> None:
        """Raises ValueError for a change that is not one of this block: a mistake of the method, not of its user."""
        rows, count = self.row_ids, len(self.keep)
        if not count or not all(0 <= e < facts.experts for e in (*self.keep, *rows)):
            raise ValueError(f"{facts.name}: experts {list(self.keep)} of {facts.experts}")
        if self.row_to_expert is None and len(rows) != count:
            raise ValueError(f"{facts.name}: {len(rows)} router rows for {count} experts, and no map")
        if self.row_to_expert is not None and (
            len(self.row_to_expert) != len(rows) or not all(0 <= e < count for e in self.row_to_expert)
        ):
            raise ValueError(f"{facts.name}: a map {list(self.row_to_expert)} of {len(rows)} rows to {count} experts")
        if self.matrix_RD is not None and self.matrix_RD.shape != (len(rows), facts.width):
            raise ValueError(f"{facts.name}: {list(self.matrix_RD.shape)} router rows of width {facts.width} for {len(rows)}")
        if self.mix_RE is not None and self.mix_RE.shape != (len(rows), facts.experts):
            raise ValueError(f"{facts.name}: a mix {list(self.mix_RE.shape)} of {facts.experts} router rows for {len(rows)}")
        if self.shift_R is not None and self.shift_R.shape != (len(rows),):
            raise ValueError(f"{facts.name}: a shift {list(self.shift_R.shape)} for {len(rows)} router rows")
        if bool(self.form) != bool(self.bank) or (
            self.form and (self.experts or list(self.keep) != list(range(facts.experts)))
        ):
            raise ValueError(f"{facts.name}: factors stand for all experts, and have a form")
        if not set(self.experts) <= set(range(count)):
            raise ValueError(f"{facts.name}: new experts {sorted(self.experts)} of {count}")


class Method:
    """Base of layer-wise methods: subclasses take their options in `__init__`, whose signature is the schema.

    `look` may be skipped by methods that need only one layer at a time; a method that ranks over the whole model returns
    little from `look` (a vector of scores), and gets all of it in `decide`.
    """

    stock = True
    """Whether a model of the architecture's own class holds what this method makes, where all blocks end up of one size."""
    reads_rows = False
    """Whether it reads or writes the router's rows, one of each expert: then none may share an expert."""
    drops = False
    """Whether rows of the router go."""
    shares = False
    """Whether rows share experts afterwards."""
    uneven = False
    """Whether layers may end with unequal numbers of experts that nobody knows before."""
    factors = False
    """Whether experts are factors afterwards."""
    needs: frozenset[str] = frozenset()
    """Tiers that these options read beside those that the method is registered with."""
    remark: str = ""
    """What a plan should say of it beside what comes out."""
    together = ""
    """Why these options must see all layers before the first is changed; empty where each layer is decided by itself, and
    then `decide` says of one layer what it says of it among all."""

    def plan(self, blocks: Sequence[Facts]) -> list[int]:
        """Experts of each block afterwards, as far as is known without statistics. Raises BadInput for what cannot apply."""
        return [facts.experts for facts in blocks]

    def inner(self, facts: Facts) -> int:
        """The inner width of its experts afterwards, as far as a model of the architecture's own class has to know it."""
        return facts.inner

    def bytes(self, facts: Facts, count: int) -> int:
        """What a block of `count` experts takes afterwards, about."""
        return count * facts.expert_bytes * self.inner(facts) // facts.inner

    def look(self, layer: Layer) -> Any:
        """What of this layer the decision needs."""
        return None

    def decide(self, looks: Sequence[Any], blocks: Sequence[Facts]) -> list[Any]:
        """One decision per layer; by default what `look` returned."""
        return list(looks)

    def change(self, layer: Layer, decision: Any) -> Change:
        raise NotImplementedError

    def objective(self) -> Objective | None:
        """What trains the same result from checkpoint to checkpoint, for a step that is given texts; None where nothing does.

        Raises BadInput for options that do not go with it.
        """
        return None


def count_kept(facts: Facts, keep: float | int) -> int:
    """How many experts stay for `keep`: a share of them (a float up to 1) or a number; the same in every group.

    Where blocks differ, a share of a small one may be too few: what its router needs stays, and in equal groups.
    Raises BadInput where that is more than there are, or too few for the router.
    """
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise BadInput(f"keep {keep}: a share above 0 and at most 1, or a whole number of experts")
    count = round(facts.experts * keep) if isinstance(keep, float) else int(keep)
    if facts.uneven and isinstance(keep, float):
        count = min(facts.experts, max(facts.least, round(count / facts.groups) * facts.groups))
    if facts.at_least and not isinstance(keep, float) and count > facts.at_least:
        raise BadInput(
            f"keep {keep}: the step before leaves {facts.name} as many experts as its statistics say, {facts.at_least} or "
            f"more: give a share, or at most {facts.at_least}"
        )
    if count > facts.experts:
        raise BadInput(f"keep {keep}: {facts.name} has {facts.experts} experts (already pruned?)")
    if count % facts.groups:
        near = sorted({count // facts.groups * facts.groups, -(-count // facts.groups) * facts.groups} - {0})
        raise BadInput(
            f"keep {keep}: {count} experts do not divide into the {facts.groups} groups of {facts.name}; "
            f"keep {' or '.join(map(str, near))} of {facts.experts}"
        )
    if count < facts.least:
        why = f"its router chooses {facts.top_k} per token"
        if facts.groups > 1:
            why += f" from {facts.chosen_groups} of {facts.groups} groups"
        raise BadInput(
            f"keep {keep}: {facts.name} would keep {count} of {facts.experts} experts; {why}: keep at least {facts.least}"
        )
    return count


def best(scores_E: Tensor, count: int, groups: int = 1, protected: Sequence[int] = ()) -> list[int]:
    """The `count` experts of highest score, equally many of each group, in ascending order; ties go to the lower number."""
    scores_E = scores_E.double().clone()
    scores_E[list(protected)] = torch.inf
    kept: list[int] = []
    size = len(scores_E) // groups
    for group in range(groups):
        mine = scores_E[group * size : (group + 1) * size]
        order = torch.argsort(mine, descending=True, stable=True)[: count // groups]
        kept += (order + group * size).tolist()
    return sorted(kept)
