"""The state of a fine-tuning under way: one safetensors file, written beside and renamed, from which the same steps go on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing

EVERY = 30.0
"""Seconds between two snapshots, at least."""


class Stateful(Protocol):
    """What keeps numbers of its own between two steps: scores, a second optimiser."""

    def state(self) -> dict[str, Tensor]: ...
    def load_state(self, state: dict[str, Tensor]) -> None: ...


class Snapshots:
    """Parameters, the model's buffers (steps of a schedule, biases that a controller moves), the optimiser's moments, the
    objective's own numbers, the random state and the losses so far, in `file`."""

    def __init__(
        self, file: Path, kept: list[nn.Parameter], buffers: dict[str, Tensor], optimizer: torch.optim.Optimizer,
        state: Stateful | None,
    ) -> None:  # fmt: skip
        self.file, self.kept, self.buffers, self.optimizer, self.own = file, kept, buffers, optimizer, state
        self.last = time.monotonic()

    def save(self, losses: list[float], ended: bool = False) -> None:
        """Now, if the training has `ended`; else when it is time again."""
        if not ended and time.monotonic() - self.last < EVERY:
            return
        found = {f"weight.{i}": p.detach().cpu() for i, p in enumerate(self.kept)}
        found |= {f"buffer.{name}": buffer.detach().cpu() for name, buffer in self.buffers.items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            found |= {f"moment.{i}.{name}": value.cpu() for name, value in entry.items()}
        if self.own is not None:
            found |= {f"own.{name}": value.cpu() for name, value in self.own.state().items()}
        found |= {"losses": torch.tensor(losses, dtype=torch.float64), "rng": torch.get_rng_state()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as scratch:
            save_file(
                {name: tensor.contiguous().clone() for name, tensor in found.items()}, scratch, {"ended": str(int(ended))}
            )
        self.last = time.monotonic()

    def load(self) -> tuple[list[float], bool]:
        """Put the newest snapshot in place, if there is one; the losses so far, and whether that was the end.

        Raises BadInput for a file that is broken or of other parameters.
        """
        if not self.file.is_file():
            return [], False
        try:
            with safe_open(self.file, "pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                ended = (opened.metadata() or {}).get("ended") == "1"
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self.file}: broken snapshot ({error}): delete it") from error
        places: dict[str, Tensor] = {f"weight.{i}": p for i, p in enumerate(self.kept)}
        places |= {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        shapes = {name: tensor.shape for name, tensor in found.items() if name.startswith(("weight.", "buffer."))}
        if {name: place.shape for name, place in places.items()} != shapes:
            raise BadInput(f"{self.file} is of other parameters: delete it")
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(found[name])
        moments: dict[int, dict[str, Tensor]] = {}
        own: dict[str, Any] = {}
        for name, value in found.items():
            kind, _, rest = name.partition(".")
            if kind == "moment":
                i, _, leaf = rest.partition(".")
                moments.setdefault(int(i), {})[leaf] = value
            elif kind == "own":
                own[rest] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if self.own is not None:
            self.own.load_state(own)
        torch.set_rng_state(found["rng"])
        return found["losses"].tolist(), ended
