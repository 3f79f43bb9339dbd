"""Which bytes on disk make expert e of a layer, learnt from transformers' own conversion rules.

A checkpoint may keep an expert as tensors of its own (`experts.3.gate_proj.weight`) or as a row of a stack, transposed or
not. transformers describes how such tensors become its stacked parameters; here the same operations run for one expert at a
time. That this gives the same numbers is not assumed: every rule is tried on two experts of small numbers first. Where the
small numbers also show that an expert's bytes are its sources' bytes one after another, nothing is converted at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moesaic.core.errors import BadInput
from moesaic.store import Range, Reader, Table
from moesaic.store.slots import LINE
from moesaic.view.skeleton import fp8

SMALL = 8
"""What the widths' common factor becomes in a trial: large enough that no permutation of rows looks like none."""

READABLE = (torch.bfloat16, torch.float16, torch.float32)

SCALE = "_scale_inv"
"""What the name of an fp8 tensor's scales ends in, after the tensor's own."""


@dataclass
class Source:
    """How one stacked parameter `[E, ., .]` comes from the checkpoint.

    Attributes:
        shape: of one expert's matrix.
        lists: per pattern of the rule, the tensors that feed it in order; one tensor where experts are stacked.
        rule: the conversion, None where the parameter is stored as it is.
        at, shared: which of the parameters that share these tensors this one is (0 of 1 for nearly all).
        order: the sources whose bytes, one after another, are the expert; None where they must be converted.
        mapped: whether transformers, without a change of dtype, leaves the parameter where the file is mapped.
        scales: of fp8 experts, a scale for every block of each of the tensors in `lists`; else empty.
    """

    name: str
    shape: tuple[int, ...]
    experts: int
    lists: dict[str, list[Range]]
    rule: WeightConverter | None = None
    at: int = 0
    shared: int = 1
    model: Any = None
    order: list[int] | None = field(default_factory=lambda: [0])
    mapped: bool = True
    scales: dict[str, list[Range]] = field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        return all(len(ranges) == 1 and len(ranges[0].shape) == len(self.shape) + 1 for ranges in self.lists.values())

    def ranges(self, e: int) -> list[Range]:
        """The bytes of expert e, in the order of the rule's patterns."""
        if self.stacked:
            return [ranges[0].rows(e, e + 1) for ranges in self.lists.values()]
        return [ranges[self.at * self.experts + e] for ranges in self.lists.values()]

    def scale_ranges(self, e: int) -> list[Range]:
        """The scales of `ranges(e)`, none where the experts are not fp8."""
        return [self.scales[pattern][self.at * self.experts + e] for pattern in self.lists if self.scales]

    def shift(self, e: int, dtype: torch.dtype) -> int:
        """Where in a cache line the resident model has expert e: in the mapped file, or in an aligned copy of the stack."""
        stored = self.ranges(e)[0]
        return (
            stored.start % LINE if self.mapped and stored.dtype == dtype else e * math.prod(self.shape) * dtype.itemsize % LINE
        )

    def made(self, e: int, read: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What was read of `ranges(e)` and then `scale_ranges(e)` as plain tensors of the ranges, fp8 ones in the dtype."""
        if not self.scales:
            return read
        half = len(read) // 2
        return [fp8.widen(codes, scale, dtype) for codes, scale in zip(read[:half], read[half:], strict=True)]

    def assemble(self, read: Sequence[Tensor], shape: tuple[int, ...] | None = None) -> Tensor:
        """One expert's matrix from what was read of `ranges(e)`, in the dtype given. `shape`: where it is another than ours."""
        return self._alone(read, self.shape if shape is None else shape)

    def _alone(self, read: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The rule on one expert; parameters that share the tensors get zeros in place of theirs."""
        lists = []
        for tensor in read:
            blank = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            lists.append([tensor if at == self.at else blank for at in range(self.shared)])
        return self._apply(lists, 1, shape)[self.at][0]

    def _apply(self, lists: list[list[Tensor]], count: int, shape: tuple[int, ...]) -> list[Tensor]:
        assert self.rule is not None
        stand_in = _Few(self.model, self.name, (count, *shape))
        made = apply(self.rule, self.name, dict(zip(self.lists, lists, strict=True)), stand_in, self.model)
        return list(made.values())

    def prove(self) -> None:
        """Try the rule on two experts of small numbers, together and one by one, and learn the order of bytes.

        Raises BadInput where experts cannot be had one by one.
        """
        sizes = [[self._matrix(ranges, at) for at in range(self.shared)] for ranges in self.lists.values()]
        unit = math.gcd(*self.shape, *(n for shapes in sizes for shape in shapes for n in shape))
        scale = min(unit, SMALL)
        small = tuple(scale * n // unit for n in self.shape)
        lists, number = [], 1
        for shapes in sizes:
            tagged: list[Tensor] = []
            for shape in shapes:
                size = tuple(scale * n // unit for n in shape)
                made = torch.arange(number, number + 2 * math.prod(size)).view(2, *size)
                number += made.numel()
                tagged += [made] if self.stacked else made.unbind()
            lists.append(tagged)
        try:
            whole = self._apply([list(tensors) for tensors in lists], 2, small)[self.at]
            self.mapped = whole.data_ptr() == lists[0][0].data_ptr()
            for e in range(2):
                mine = [t[0][e : e + 1] if self.stacked else t[self.at * 2 + e] for t in lists]
                alone = self._alone(mine, small)
                if alone.shape != small or not torch.equal(alone, whole[e]):
                    raise ValueError(f"expert {e} alone differs")
                self.order = _order(mine, alone)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise BadInput(
                f"{self.name}: its experts cannot be read one by one from {next(iter(self.lists.values()))[0].name} ({error})"
            ) from error

    def _matrix(self, ranges: list[Range], at: int) -> tuple[int, ...]:
        return ranges[0].shape[1:] if self.stacked else ranges[at * self.experts].shape


def apply(rule: WeightConverter, name: str, held: dict[str, Any], stand_in: Any, model: Any) -> dict[str, Tensor]:
    """What a rule makes of tensors by its patterns: parameters by its target patterns. `name`: of one of them."""
    rule = deepcopy(rule)
    for operation in rule.operations:
        held = operation.convert(
            held, source_patterns=rule.source_patterns, target_patterns=rule.target_patterns,
            full_layer_name=name, model=stand_in, config=model.config, missing_keys=None,
        )  # fmt: skip
    made = {target: held[target] for target in rule.target_patterns}
    return {target: tensor[0] if isinstance(tensor, list) else tensor for target, tensor in made.items()}


class _Few:
    """The model, in which the parameter has as many experts as are converted: some operations ask for its shape."""

    def __init__(self, model: Any, name: str, shape: tuple[int, ...]) -> None:
        self._model, self._name, self._shape = model, name, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self._shape, device="meta") if name == self._name else self._model.get_parameter(name)


def _order(sources: list[Tensor], made: Tensor) -> list[int] | None:
    flat = made.reshape(-1)
    order = sorted(range(len(sources)), key=lambda i: int((flat == sources[i].reshape(-1)[0]).nonzero()[0, 0]))
    joined = torch.cat([sources[i].reshape(-1) for i in order])
    return order if torch.equal(joined, flat) else None


class Other(NamedTuple):
    """What a parameter that is of no expert is made of: tensors by the rule's patterns, and the rule, None for one tensor."""

    name: str
    rule: WeightConverter | None
    lists: dict[str, list[Range]]

    @property
    def stored(self) -> Range:
        """The tensor it is, as it lies there. Raises BadInput where it is made of several."""
        (ranges,) = self.lists.values() if len(self.lists) == 1 else ([],)
        if self.rule is not None or len(ranges) != 1:
            one = next(iter(self.lists.values()))[0]
            raise BadInput(f"{one.path}: {self.name} is converted from tensors such as {one.name}, and cannot be taken apart")
        return ranges[0]

    def read(self, model: Any, reader: Reader) -> dict[str, Tensor]:
        """The parameters that come from these tensors, by name, as stored."""
        held: dict[str, Any] = {pattern: [reader.read(one) for one in ranges] for pattern, ranges in self.lists.items()}
        if self.rule is None:
            return {self.name: next(iter(held.values()))[0]}
        made, first = apply(self.rule, self.name, held, model, model), self.rule.target_patterns[0]
        return {self.name.replace(first, target): tensor for target, tensor in made.items()}


def collect(model: Any, rules: Iterable[Any], table: Table) -> dict[str, Other]:
    """Every parameter (the first, of those made together) and what it is made of.

    `rules`: the conversions that transformers would apply, as it gives them to its loader.
    """
    rules = deepcopy(list(rules))  # renaming leaves marks in them
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own = model.state_dict()
    collected: dict[str, Other] = {}
    for key in sorted(table, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], base_model_prefix=model.base_model_prefix, meta_state_dict=own)
        rule = None if pattern is None else by_pattern[pattern]
        collected.setdefault(name, Other(name, rule, {})).lists.setdefault(pattern or key, []).append(table[key])
    return collected


def find(
    model: Any, collected: dict[str, Other], table: Table, parameters: Iterable[str]
) -> tuple[dict[str, Source], set[str]]:
    """The source of each of these stacked parameters, and the names of all tensors that feed them.

    Raises BadInput naming the tensor for experts that are missing, of a dtype that is not streamed, or impossible to part.
    """
    wanted, own = set(parameters), model.state_dict()
    sources: dict[str, Source] = {}
    keys: set[str] = set()
    for first, (_, rule, lists) in collected.items():
        targets = [first] if rule is None else [first.replace(rule.target_patterns[0], t) for t in rule.target_patterns]
        mine = wanted.intersection(targets)
        if not mine:
            continue
        stored = next(iter(lists.values()))[0]
        if len(mine) < len(targets):
            raise BadInput(f"{stored.path}: tensor {stored.name} holds more than the experts of {first}: it cannot be streamed")
        keys |= {tensor.name for ranges in lists.values() for tensor in ranges}
        for at, name in enumerate(targets):
            sources[name] = _source(model, name, own[name], rule, lists, at, len(targets))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    sources |= {name: sources[tied[name]] for name in wanted - sources.keys() if tied.get(name) in sources}
    missing = sorted(wanted - sources.keys())
    if missing:
        raise BadInput(f"{table.files[0].parent} has no tensor for {missing[0]} ({len(missing)} missing)")
    return sources, keys


def _part_scales(source: Source) -> None:
    """Set fp8 scales apart from the tensors, and leave the rule what follows the widening. Raises BadInput."""
    assert source.rule is not None
    lists, source.lists = source.lists, {}
    for pattern, ranges in lists.items():
        if pattern + SCALE in lists:
            scales = lists[pattern + SCALE]
            if len(scales) != len(ranges):
                raise BadInput(
                    f"{ranges[0].path}: {len(scales)} scales such as {scales[0].name} for {len(ranges)} tensors such as "
                    f"{ranges[0].name}"
                )
            source.scales[pattern] = scales
        if not pattern.endswith((SCALE, "activation_scale")):
            source.lists[pattern] = ranges
    if source.scales and source.scales.keys() != source.lists.keys():
        plain = next(ranges[0] for pattern, ranges in source.lists.items() if pattern not in source.scales)
        raise BadInput(f"{plain.path}: tensor {plain.name} has no scales, and others of {source.name} have")
    source.rule = deepcopy(source.rule)
    source.rule.operations = [op for op in source.rule.operations if not isinstance(op, Fp8Dequantize)]


def _source(
    model: Any, name: str, own: Tensor, rule: WeightConverter | None, lists: dict[str, list[Range]], at: int, shared: int
) -> Source:
    experts, shape = own.shape[0], tuple(own.shape[1:])
    source = Source(name, shape, experts, lists, rule, at, shared, model)
    if rule is not None and any(isinstance(operation, Fp8Dequantize) for operation in rule.operations):
        _part_scales(source)
    for pattern, ranges in source.lists.items():
        stored = ranges[0]
        if not source.stacked and len(ranges) != experts * shared:
            raise BadInput(
                f"{stored.path}: {len(ranges)} tensors such as {stored.name} for {experts * shared} experts of {name}"
            )
        for i, tensor in enumerate(ranges):
            if source.scales:
                fp8.check(tensor, source.scales[pattern][i])
            elif tensor.dtype not in READABLE:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise BadInput(
                    f"{tensor.path}: tensor {tensor.name} is {kind}: experts stream from bfloat16, float16, float32, and from "
                    f"float8_e4m3fn with {SCALE.lstrip('_')} in an fp8 checkpoint"
                )
            first = ranges[i // experts * experts]
            if tensor.shape != first.shape:
                raise BadInput(f"{tensor.path}: tensor {tensor.name} is {list(tensor.shape)}, {first.name} {list(first.shape)}")
        if source.stacked and stored.shape[0] != experts:
            raise BadInput(f"{stored.path}: tensor {stored.name} has {stored.shape[0]} experts, {name} has {experts}")
    if rule is None:
        stored = next(iter(lists.values()))[0]
        if stored.shape != tuple(own.shape):
            raise BadInput(f"{stored.path}: tensor {stored.name} is {list(stored.shape)}, the model wants {list(own.shape)}")
    else:
        source.prove()
    return source
