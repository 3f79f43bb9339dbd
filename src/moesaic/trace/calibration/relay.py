"""Go on where the last group of layers ended: a pass over later layers does not compute the earlier ones again.

What enters the first decoder layer behind a group is kept on disk, batch by batch. In the next group's pass the layers
before that point only hand their input on, and the kept hidden states take its place; the model still makes masks and
positions for every layer itself. Where a model's layers share more than hidden states (keys and values, say), the first
batch tells: its relayed states differ from those of a whole pass, and the passes then begin at the first layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moesaic.view import View


class Stop(Exception):
    """The hidden states behind the group are kept: the rest of the pass is not needed."""


def place_of(blocks: View, block: int) -> tuple[nn.ModuleList, nn.Module] | None:
    """The list of decoder layers on the way down to an MoE block, and the one of them that holds it."""
    module: Any = blocks.model
    for word in blocks[block].name.split("."):
        parent, module = module, getattr(module, word)
        if isinstance(parent, nn.ModuleList):
            return parent, module
    return None


class Relay:
    """Hidden states between groups of layers, in a folder of their own. `broken`: this model cannot be taken in parts."""

    def __init__(self, blocks: View, groups: list[list[int]], folder: Path) -> None:
        self.groups, self.folder = groups, folder
        self.stack = nn.ModuleList()
        self.starts: list[int] = []
        """For each group, the decoder layer in `stack` at which its pass begins."""
        self.broken = True
        places = [place_of(blocks, group[-1]) for group in groups]
        if all(place is not None and place[0] is places[0][0] for place in places):  # type: ignore[index]
            self.stack = places[0][0]  # type: ignore[index]
            number = {id(layer): i for i, layer in enumerate(self.stack)}
            ends = [number[id(layer)] + 1 for _, layer in filter(None, places)]
            self.starts = [0, *ends[:-1]]
            self.broken = any(a >= b for a, b in pairwise(ends))  # two blocks in one decoder layer

    def usable(self, number: int) -> bool:
        """Whether a group's pass can begin at its own first layer."""
        return number > 0 and not self.broken and any(self.folder.glob(f"{number}-*.safetensors"))

    @contextmanager
    def group(self, number: int, relayed: bool = True) -> Iterator[None]:
        """Passes of one group: skip what lies before it (if `relayed`), keep what leaves it."""
        if self.broken:
            yield
            return
        self.folder.mkdir(exist_ok=True)
        undo: list[Callable[[], None]] = []
        if relayed and self.usable(number):
            undo = self._relayed(number)
        if number + 1 < len(self.groups):
            undo.append(self._keep(self.stack[self.starts[number + 1]], number + 1))
            tuples: dict[int, bool] = {}
            undo += [
                _note(layer, i, tuples) for i, layer in enumerate(self.stack[self.starts[number] : self.starts[number + 1]])
            ]
        try:
            yield
        finally:
            for take_off in undo:
                take_off()
            if number + 1 < len(self.groups) and tuples:
                known = self.folder / "tuples.json"
                held = json.loads(known.read_text()) if known.exists() else []
                known.write_text(json.dumps(held[: self.starts[number]] + [tuples[i] for i in sorted(tuples)]))

    def batch(self, key: int) -> None:
        """The batch that comes next, by a number that is the same in every group's pass."""
        self._key = key

    def check(self, number: int, run: Callable[[], None]) -> None:
        """Compare one batch, whole and relayed, at the end of a group; where they differ, the model cannot be relayed."""
        if not self.usable(number):
            return
        last = self.starts[number + 1] - 1 if number + 1 < len(self.groups) else len(self.stack) - 1
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(_first(output).detach().float().cpu())
            raise Stop

        for relayed in (False, True):
            undo = self._relayed(number) if relayed else []
            undo.append(self.stack[last].register_forward_hook(keep).remove)
            try:
                run()
            finally:
                for take_off in undo:
                    take_off()
        self.broken = len(seen) < 2 or not torch.allclose(seen[0], seen[1], rtol=1e-3, atol=1e-4)

    def drop(self, number: int) -> None:
        """The hidden states that entered a group are not needed once it is done."""
        for path in self.folder.glob(f"{number}-*.safetensors"):
            path.unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}-{self._key}.safetensors"

    def _relayed(self, number: int) -> list[Callable[[], None]]:
        """Let the layers before a group hand their input on, and feed the group what was kept; how to undo it."""
        tuples = json.loads((self.folder / "tuples.json").read_text())
        undo = [_hand_on(self.stack[i], bool(tuples[i])) for i in range(self.starts[number])]
        return [*undo, self._feed(self.stack[self.starts[number]], number)]

    def _feed(self, layer: nn.Module, number: int) -> Callable[[], None]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden, args, kwargs = _hidden(args, kwargs)
            kept = load_file(self._path(number))["hidden"].to(hidden.device, hidden.dtype)
            return (kept, *args), kwargs

        return layer.register_forward_pre_hook(enter, with_kwargs=True).remove

    def _keep(self, layer: nn.Module, number: int) -> Callable[[], None]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden, _, _ = _hidden(args, kwargs)
            save_file({"hidden": hidden.detach().cpu().contiguous()}, self._path(number))
            raise Stop

        return layer.register_forward_pre_hook(enter, with_kwargs=True).remove


def _hand_on(layer: nn.Module, as_tuple: bool) -> Callable[[], None]:
    """Let a decoder layer return its input; the taker-off brings its own forward back."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if as_tuple else hidden_states

    held = layer.__dict__.get("forward")  # accelerate, for one, puts a forward of its own on the instance
    layer.forward = forward

    def undo() -> None:
        del layer.forward
        if held is not None:
            layer.forward = held

    return undo


def _note(layer: nn.Module, number: int, tuples: dict[int, bool]) -> Callable[[], None]:
    def after(module: nn.Module, args: tuple, output: Any) -> None:
        tuples[number] = isinstance(output, tuple)

    return layer.register_forward_hook(after).remove


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _hidden(args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, tuple, dict[str, Any]]:
    """The hidden states of a decoder layer's call, and the rest of its arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}
