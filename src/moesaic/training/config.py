"""The training recipe: one YAML file, checked before anything is read or written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moesaic.core.errors import BadInput
from moesaic.training.divergence import DivergenceRule


class SpawnRule(BaseModel):
    """When and how `experts.spawn` makes all experts of a layer from one."""

    model_config = ConfigDict(extra="forbid")

    at: int = Field(gt=0, description="step before which it happens; until then every choice runs `source`")
    source: int = Field(0, ge=0)
    zeroed: float = Field(0.5, ge=0, lt=1, description="share of each copy's first matrix that is lost")
    noise: float = Field(0.0, ge=0, description="standard deviations of the matrix, added")


class TrainConfig(BaseModel):
    """Everything a run depends on. Relative paths are taken from the folder where the command runs."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="file or folder of {text, domain} documents")
    valid: str | None = Field(None, description="held-out documents, scored every eval_every steps")
    out: str = Field(description="run folder: log, checkpoints, final model")
    tokenizer: str | None = Field(None, description="folder of a trained tokenizer; trained on the data when absent")
    vocab_size: int = Field(8192, gt=256, le=65536)
    model: dict[str, Any] = Field(description="transformers config as a dict: model_type and its fields")
    seq_len: int = Field(512, gt=1)
    batch_size: int = Field(16, gt=0, description="sequences per micro-step")
    accumulate: int = Field(1, gt=0, description="micro-steps per optimiser step")
    steps: int = Field(gt=0)
    lr: float = Field(2e-3, gt=0)
    min_lr_ratio: float = Field(0.05, ge=0, le=1)
    warmup: int = Field(100, ge=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay: float = Field(0.3, gt=0, le=1, description="wsd: share of the steps, at the end, over which the rate falls")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(1.0, gt=0)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    balance: dict[str, float | dict[str, Any]] = Field(
        default_factory=dict, description="balancing method -> coefficient, or -> its parameters"
    )
    balance_scope: Literal["sequence", "micro_batch", "data_parallel", "global"] = Field(
        "micro_batch", description="which tokens the balance losses count; global: the whole batch of an optimiser step"
    )
    consistency: float = Field(0.0, ge=0, description="THOR: two forwards per micro-step, which must agree this much")
    experts_implementation: str = "moesaic"
    attention: str = Field("auto", description="a transformers attention implementation; auto: the fastest that fits")
    seed: int = 0
    eval_every: int = Field(250, gt=0)
    eval_tokens: int = Field(65536, gt=0)
    save_every: int = Field(250, gt=0)
    log_every: int = Field(10, gt=0)
    divergence: DivergenceRule | None = Field(
        DivergenceRule(),
        description="when a rising loss stops the run; null: only numbers that are not finite do",
    )
    spawn: SpawnRule | None = Field(None, description="EvoMoE: one expert trains alone, then all become varied copies of it")
    parallel: Literal["ddp", "fsdp"] = Field("ddp", description="how the processes of torchrun share the work")
    threads: int | None = Field(None, gt=0)
    device: str = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: {self.warmup} must be less than steps, {self.steps}")
        if self.spawn and self.spawn.at >= self.steps:
            raise ValueError(f"spawn.at: {self.spawn.at} must be less than steps, {self.steps}")
        return self

    @classmethod
    def read(cls, path: str | Path, sets: Sequence[str] = (), **overrides: Any) -> TrainConfig:
        """Parse a YAML recipe; `sets` are key=value changes (`lr=1e-3`, `model.num_experts=8`), values in YAML.

        Raises BadInput that names the file and every wrong field.
        """
        path = Path(path)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise BadInput(f"{path}: cannot read the training config ({reason})") from error
        except yaml.YAMLError as error:
            raise BadInput(f"{path}: not YAML ({' '.join(str(error).split())})") from error
        if not isinstance(raw, dict):
            raise BadInput(f"{path}: a training config is a mapping of fields")
        for change in sets:
            set_field(raw, *parse_set(change), f"--set {change}")
        raw.update(overrides)
        return cls.of(raw, path)

    @classmethod
    def of(cls, raw: dict[str, Any], where: Any) -> TrainConfig:
        """Check the fields of a recipe. Raises BadInput naming `where` and every wrong field."""
        try:
            return cls(**raw)
        except (ValidationError, TypeError) as error:
            raise BadInput(f"{where}: {_problems(cls, error)}") from error


def parse_set(change: str) -> tuple[str, Any]:
    """`key=value`, the value in YAML, as a pair. Raises BadInput."""
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set {change}: write key=value, such as lr=1e-3 or model.num_experts=8")
    try:
        return key.strip(), _number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise BadInput(f"--set {change}: the value is not YAML") from error


def set_field(raw: dict[str, Any], key: str, value: Any, where: str = "") -> None:
    """Change the field of a dotted name in place, making mappings on the way. Raises BadInput where one is something else."""
    *path, last = key.split(".")
    for name in path:
        inner = raw.setdefault(name, {})
        if not isinstance(inner, dict):
            raise BadInput(f"{where or key}: {name} is not a mapping")
        raw = inner
    raw[last] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; people write it all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _problems(cls: type[BaseModel], error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"a field name is not text ({error})"
    said = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"] if part not in ("float", "dict[str,any]"))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(where, cls.model_fields, 1)
            message = "no such field" + (f"; did you mean {close[0]}?" if close else "")
        said.append(f"{where}: {message}" if where else message)
    return "; ".join(dict.fromkeys(said))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate at `step` (0-based): linear warm-up, then cosine over the rest, or flat with a cosine tail (wsd)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    start = config.warmup if config.schedule == "cosine" else max(config.warmup, round(config.steps * (1 - config.decay)))
    if step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, config.steps - start))
    floor = config.min_lr_ratio
    return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
