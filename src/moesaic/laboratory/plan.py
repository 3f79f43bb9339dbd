"""A sweep file: one base recipe, a grid or a list of cells over it, seeds; every cell becomes a checked training recipe."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesaic.core.errors import BadInput
from moesaic.training.config import TrainConfig, set_field

OWN = {"name", "group", "seeds", "match"}
"""What a cell says about itself; everything else in it changes a field of the recipe."""
SHARED = ("data", "valid", "tokenizer", "vocab_size")
"""Fields that decide the tokens: cells equal in these share one tokenizer and one cache."""


class SweepFile(BaseModel):
    """The YAML file. Keys of `set`, `grid` and cells are dotted names of recipe fields, as in `moesaic train --set`."""

    model_config = ConfigDict(extra="forbid")

    base: str | dict[str, Any] = Field(description="a recipe: its path, from the sweep file's folder, or its fields")
    out: str = "runs/sweep"
    set: dict[str, Any] = Field(default_factory=dict, description="changes to the base, for every cell")
    grid: dict[str, list[Any]] = Field(default_factory=dict, description="every combination is a cell")
    cells: list[dict[str, Any]] = Field(default_factory=list, description="cells by hand: name, seeds, group, match, fields")
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    left_out: dict[str, str] = Field(default_factory=dict, description="what is not run, and why; for the report")


@dataclass(frozen=True)
class Cell:
    """One training: a recipe without `out`, where it belongs in tables, and what it is matched to."""

    name: str
    group: str
    seed: int
    changes: dict[str, Any]
    recipe: dict[str, Any]
    match: str | None = None
    """Field of the recipe that is fitted until the cell's FLOPs per token are those of the base model."""

    @property
    def key(self) -> str:
        """File name of the cell's result."""
        return f"{self.name}-s{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the result depends on."""
        told = json.dumps([self.recipe, self.match], sort_keys=True, default=str)
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    @property
    def facts(self) -> dict[str, Any]:
        """What every result says of its cell."""
        told = {"cell": self.key, "name": self.name, "group": self.group, "seed": self.seed}
        return {**told, "fingerprint": self.fingerprint, "changes": self.changes}

    @property
    def tokens_key(self) -> str:
        told = json.dumps([self.recipe.get(name) for name in SHARED])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def config(self, out: str | Path, **changes: Any) -> TrainConfig:
        """The checked recipe. Raises BadInput naming the cell and every wrong field."""
        return TrainConfig.of({**self.recipe, "out": str(out), **changes}, f"cell {self.name}")


@dataclass(frozen=True)
class Plan:
    """A sweep file, read and expanded."""

    path: Path
    out: Path
    base: dict[str, Any]
    cells: tuple[Cell, ...]
    left_out: dict[str, str]

    def again(self, cells: list[Cell], seeds: list[int]) -> list[Cell]:
        """These cells once more with other seeds."""
        return [_cell(c.name, c.group, seed, c.changes, self.base, c.match) for c in cells for seed in seeds]


def read_plan(path: str | Path, out: str | None = None, sets: dict[str, Any] | None = None) -> Plan:
    """Read and expand a sweep file; `sets` changes every cell, and wins.

    Raises BadInput naming the file, the cell and the field: a wrong cell is found before anything runs.
    """
    path = Path(path)
    told = _parse(path)
    base = _base(told, path)
    for key, value in told.set.items():
        set_field(base, key, value)
    base.pop("out", None)
    cells: list[Cell] = []
    for name, group, seeds, changes, match in _asked(told, path):
        for seed in seeds:
            cells.append(_cell(name, group, seed, {**changes, **(sets or {})}, base, match))
    twice = sorted({cell.key for cell in cells if sum(c.key == cell.key for c in cells) > 1})
    if twice:
        raise BadInput(f"{path}: two cells are called {', '.join(twice)}: give each its own name")
    for cell in cells:
        cell.config("unused")
    return Plan(path, Path(out or told.out), base, tuple(cells), told.left_out)


def _parse(path: Path) -> SweepFile:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot read the sweep file ({getattr(error, 'strerror', None) or 'not UTF-8'})") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: a sweep file is a mapping with base, and grid or cells")
    try:
        told = SweepFile(**raw)
    except (ValidationError, TypeError) as error:
        said = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in said)
        raise BadInput(f"{path}: {words}") from error
    if not told.grid and not told.cells:
        raise BadInput(f"{path}: no cells: give grid (field -> values) or cells (a list)")
    return told


def _base(told: SweepFile, path: Path) -> dict[str, Any]:
    if isinstance(told.base, dict):
        return copy.deepcopy(told.base)
    file = next((f for f in (path.parent / told.base, Path(told.base)) if f.is_file()), None)
    if file is None:
        raise BadInput(f"{path}: base: no recipe {told.base}, neither beside the sweep file nor from here")
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise BadInput(f"{file}: a training config is a mapping of fields")
    return raw


def _asked(told: SweepFile, path: Path) -> list[tuple[str, str, list[int], dict[str, Any], str | None]]:
    asked: list[tuple[str, str, list[int], dict[str, Any], str | None]] = []
    for values in itertools.product(*told.grid.values()) if told.grid else ():
        changes = dict(zip(told.grid, values, strict=True))
        name = "-".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in changes.items())
        asked.append((_file_name(name), "grid", told.seeds, changes, None))
    for number, cell in enumerate(told.cells):
        if not isinstance(cell.get("name"), str) or not re.fullmatch(r"[\w.+=-]+", cell["name"]):
            raise BadInput(f"{path}: cells[{number}]: a name of letters, digits and . + = - _, not {cell.get('name')!r}")
        seeds = cell.get("seeds", told.seeds)
        if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
            raise BadInput(f"{path}: cell {cell['name']}: seeds: a list of whole numbers, not {seeds!r}")
        changes = {key: value for key, value in cell.items() if key not in OWN}
        asked.append((cell["name"], str(cell.get("group", "cells")), seeds, changes, cell.get("match")))
    return asked


def _cell(name: str, group: str, seed: int, changes: dict[str, Any], base: dict[str, Any], match: str | None) -> Cell:
    recipe = copy.deepcopy(base)
    for key, value in changes.items():
        set_field(recipe, key, copy.deepcopy(value))
    return Cell(name, group, seed, changes, {**recipe, "seed": seed}, match)


def _short(value: Any) -> str:
    return str(value) if isinstance(value, str | int | float | bool) or value is None else json.dumps(value, default=str)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "_", text).strip("_")
