"""Which experts a behaviour uses: activation maps of two sets of prompts, and the experts that differ most between them.

P prompts, L MoE blocks, E experts (the most of any block), T tokens, K slots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import write_atomically
from moesaic.trace.file import Trace
from moesaic.view import View
from moesaic.view.tap import Choice

By = Literal["weights", "counts"]
FORMAT = "moesaic behaviour map 1"


def activation_maps(
    model: Any, blocks: View, prompts: Sequence[Sequence[int]], by: By = "weights", per_token: bool = False
) -> Tensor:
    """A [P, L, E]: the sum of each expert's weights over a prompt's tokens, 0 where it is not selected; float64.

    `by` counts selections instead; `per_token` divides by the prompt's tokens, since prompts differ in length. Every prompt is
    read alone. Shared experts are no routed ones and are not in it. Raises BadInput for an empty prompt.
    """
    widest = max(block.num_experts for block in blocks)
    maps_PLE = torch.zeros(len(prompts), len(blocks), widest, dtype=torch.float64)
    at = {block.name: index for index, block in enumerate(blocks)}
    number = 0

    def add(choice: Choice, block: Any) -> None:
        ids_TK, weights_TK = choice.ids.reshape(-1, choice.ids.shape[-1]), choice.weights
        real_TK = (ids_TK >= 0) & (ids_TK < block.num_experts)
        weights_TK = weights_TK.reshape(ids_TK.shape).double() if by == "weights" else torch.ones_like(ids_TK).double()
        row_E = maps_PLE[number, at[block.name]]
        row_E.index_add_(0, ids_TK[real_TK].long().cpu(), weights_TK[real_TK].cpu())

    handles = [block.on_choice(add) for block in blocks]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.inference_mode():
            for number, ids in enumerate(prompts):
                if not len(ids):
                    raise BadInput(f"prompt {number + 1} is empty: it has no tokens to map")
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if per_token:
        maps_PLE /= torch.tensor([len(ids) for ids in prompts]).view(-1, 1, 1)
    return maps_PLE


def maps_of_trace(trace: Trace, by: By = "weights", per_token: bool = False) -> tuple[Tensor, list[str]]:
    """`activation_maps` of a trace's sequences, and the domain of each. Raises BadInput where it holds no weights."""
    if by == "weights" and trace.weights_TLK is None:
        raise BadInput(f"{trace.name} holds no weights: record it with them, or map by counts")
    maps_SLE = torch.zeros(len(trace.domain_S), len(trace.layers), trace.num_experts, dtype=torch.float64)
    flat = maps_SLE.view(-1)
    sequence_T = torch.from_numpy(trace.sequence_T).long()
    layer_L = torch.arange(len(trace.layers))
    for rows, ids in trace.blocks():
        ids_TLK = torch.from_numpy(ids.astype("int64"))
        real_TLK = ids_TLK != trace.empty
        weights = (
            None if by == "counts" or trace.weights_TLK is None else torch.from_numpy(trace.weights_TLK[rows].astype("f8"))
        )
        weights_TLK = torch.ones(ids_TLK.shape, dtype=torch.float64) if weights is None else weights
        place_TLK = (sequence_T[rows].view(-1, 1, 1) * len(trace.layers) + layer_L.view(1, -1, 1)) * trace.num_experts + ids_TLK
        flat.index_add_(0, place_TLK[real_TLK], weights_TLK[real_TLK])
    if per_token:
        maps_SLE /= torch.from_numpy(trace.lengths_S).clamp(min=1).view(-1, 1, 1)
    return maps_SLE, [trace.domains[d] if d >= 0 else "" for d in trace.domain_S.tolist()]


def difference(maps: Mapping[str, Tensor], target: str) -> Tensor:
    """R [L, E] of a class: its mean map less the mean of the other classes' mean maps. Each value is [P, L, E].

    Raises BadInput for an unknown class, a class without prompts, and fewer than two classes.
    """
    if target not in maps or len(maps) < 2:
        raise BadInput(f"behaviour {target!r}: give it and at least one other class; there are {', '.join(maps) or 'none'}")
    for name, maps_PLE in maps.items():
        if not len(maps_PLE):
            raise BadInput(f"behaviour {name!r} has no prompts")
    others = [maps_PLE.mean(0) for name, maps_PLE in maps.items() if name != target]
    return maps[target].mean(0) - torch.stack(others).mean(0)


def top(difference_LE: Tensor, count: int) -> list[tuple[int, int, float]]:
    """(block index, expert, score) of the `count` largest, best first; ties go to the first layer, then to the first expert."""
    if not 1 <= count <= difference_LE.numel():
        raise BadInput(f"top {count}: between 1 and the {difference_LE.numel()} experts of the map")
    order = torch.sort(difference_LE.flatten(), descending=True, stable=True).indices[:count].tolist()
    return [(*divmod(at, difference_LE.shape[1]), float(difference_LE.flatten()[at])) for at in order]


@dataclass(frozen=True)
class BehaviourMap:
    """What `moesaic steer find` writes: the differential map of a behaviour, by block name."""

    model: str
    behaviour: str
    prompts: dict[str, int]
    by: str
    per_token: bool
    blocks: tuple[str, ...]
    difference: tuple[tuple[float, ...], ...]
    """R [L, E]."""

    def top(self, count: int) -> dict[str, list[int]]:
        """Block name -> the experts among the `count` that differ most."""
        found: dict[str, list[int]] = {}
        for index, expert, _ in top(torch.tensor(self.difference, dtype=torch.float64), count):
            found.setdefault(self.blocks[index], []).append(expert)
        return found

    def rows(self, count: int) -> list[dict[str, Any]]:
        chosen = top(torch.tensor(self.difference, dtype=torch.float64), count)
        return [{"block": self.blocks[index], "expert": expert, "score": score} for index, expert, score in chosen]

    def write(self, path: Path) -> Path:
        return write_atomically(path, json.dumps({"format": FORMAT, **asdict(self)}))

    @classmethod
    def read(cls, path: str | Path) -> BehaviourMap:
        """Raises BadInput for a file that is none."""
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"{path}: {error.strerror or error}") from error
        except ValueError as error:
            raise BadInput(f"{path}: no JSON ({error})") from error
        if not isinstance(given, dict) or given.pop("format", None) != FORMAT:
            raise BadInput(f"{path} is no behaviour map: `moesaic steer find` writes one")
        try:
            given["blocks"] = tuple(given["blocks"])
            given["difference"] = tuple(tuple(float(value) for value in row) for row in given["difference"])
            return cls(**given)
        except (TypeError, ValueError, KeyError) as error:
            raise BadInput(f"{path}: a broken behaviour map ({error}): find it again") from error
