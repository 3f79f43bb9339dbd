"""One block's experts as a sequence: read, replace and run expert e whatever the storage is.

Canonical form of one expert (D width, I inner width): gate [I, D], up [I, D], down [D, I], and biases gate_bias [I],
up_bias [I], down_bias [D] where the architecture has them. A non-gated expert has no gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.view import implementation

if TYPE_CHECKING:
    from moesaic.view.block import Block
    from moesaic.view.tap import Handle


class ExpertWeights(Mapping[str, Tensor]):
    """The tensors of one expert by name, in canonical orientation; also as attributes: `expert.gate`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["_tensors"][name]
        except KeyError:
            names = ", ".join(self.__dict__.get("_tensors", {}))
            raise AttributeError(f"this expert has no {name!r}: it has {names}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"ExpertWeights({', '.join(f'{k} {list(v.shape)}' for k, v in self.items())})"

    def map(self, change: Callable[[Tensor], Tensor]) -> ExpertWeights:
        """A new expert with `change(tensor)` for each tensor."""
        return ExpertWeights({name: change(tensor) for name, tensor in self.items()})


class ViewBank:
    """The experts of one block. `bank[e]` is a copy, so that experts can be swapped; `peek(e)` reads without copying."""

    def __init__(self, block: Block) -> None:
        experts: Any = block.experts
        self.experts = experts
        self.name = block.name
        self._block = block
        self.gated = bool(experts.has_gate)
        self.biased = bool(experts.has_bias)
        self.transposed = bool(experts.is_transposed)
        self.interleaved = self.gated and not experts.is_concatenated
        self._row_to_expert: Tensor | None = None
        self._remap_handle: Handle | None = None

    def __len__(self) -> int:
        return self.experts.down_proj.shape[0]

    def __iter__(self) -> Iterator[ExpertWeights]:
        return (self[e] for e in range(len(self)))

    def peek(self, e: int) -> ExpertWeights:
        """Expert e as views of the stored parameters: nothing is copied, and later writes show through."""
        e = self._index(e)
        module = self.experts
        flip = (lambda m: m.T) if self.transposed else (lambda m: m)
        tensors: dict[str, Tensor] = {}
        up_name = "gate_up_proj" if self.gated else "up_proj"
        up_HD = flip(getattr(module, up_name)[e])
        up_bias = getattr(module, up_name + "_bias")[e] if self.biased else None
        if self.gated:
            tensors["gate"], tensors["up"] = self._halves(up_HD)
        else:
            tensors["up"] = up_HD
        tensors["down"] = flip(module.down_proj[e])
        if up_bias is not None:
            if self.gated:
                tensors["gate_bias"], tensors["up_bias"] = self._halves(up_bias)
            else:
                tensors["up_bias"] = up_bias
            tensors["down_bias"] = module.down_proj_bias[e]
        return ExpertWeights(tensors)

    def __getitem__(self, e: int) -> ExpertWeights:
        self._readable()
        return self.peek(e).map(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format))

    @torch.no_grad()
    def __setitem__(self, e: int, expert: Mapping[str, Tensor]) -> None:
        self._readable()
        stored = self.peek(e)
        where = f"{self.name} expert {self._index(e)}"
        if set(expert) != set(stored):
            raise BadInput(f"{where}: an expert here has {', '.join(stored)}; given {', '.join(expert)}")
        for name, target in stored.items():
            given = expert[name]
            if given.shape != target.shape:
                raise BadInput(f"{where}: {name} must be {list(target.shape)}, given {list(given.shape)}")
            if given.is_floating_point() != target.is_floating_point():
                raise BadInput(f"{where}: {name} is {target.dtype}, given {given.dtype}; dequantise it first")
        for name, target in stored.items():
            target.copy_(expert[name])

    def __call__(self, x_SD: Tensor, offsets_E1: Tensor) -> Tensor:
        """Rows sorted by expert -> each row through its expert, unweighted, in the same order."""
        rows = x_SD.shape[0]
        if int(offsets_E1[-1]) != rows or offsets_E1.numel() != len(self) + 1:
            raise BadInput(f"{self.name}: offsets must be [{len(self) + 1}] and end at {rows}, the rows given")
        ones_S = torch.ones(rows, dtype=x_SD.dtype, device=x_SD.device)
        token_S = torch.arange(rows, device=x_SD.device)
        return implementation.run(self.experts, x_SD, Dispatch(token_S, ones_S, offsets_E1.long(), rows))

    def run_one(self, e: int, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert e on rows x as the model computes it: inner activations h [S, I], and outputs f [S, D] before weighting."""
        e, form = self._index(e), implementation.form_of(self.experts)
        up, down = getattr(self.experts, "gate_up_proj" if self.gated else "up_proj")[e], self.experts.down_proj[e]
        up_bias = None if form.gate_up_bias_EH is None else form.gate_up_bias_EH[e]
        down_bias = None if form.down_bias_ED is None else form.down_bias_ED[e]
        h_SI = form.activate(linear(x_SD.to(up.dtype), up.T if self.transposed else up, up_bias))
        f_SD = linear(h_SI, down.T if self.transposed else down, down_bias)
        return h_SI, f_SD if form.post is None else form.post(f_SD)

    @property
    def row_to_expert(self) -> Tensor:
        """Stored expert of each router row, int64 [E]; the identity unless set. Several rows may share one expert."""
        return torch.arange(len(self)) if self._row_to_expert is None else self._row_to_expert

    @row_to_expert.setter
    def row_to_expert(self, rows_E: Tensor | None) -> None:
        if rows_E is not None:
            rows_E = torch.as_tensor(rows_E, dtype=torch.long)
            if rows_E.shape != (len(self),) or not 0 <= int(rows_E.min()) <= int(rows_E.max()) < len(self):
                raise BadInput(f"{self.name}: row_to_expert must be [{len(self)}] ids within 0 to {len(self) - 1}")
        self._row_to_expert = rows_E
        if rows_E is not None and self._remap_handle is None:
            self._remap_handle = self._block.hold()
        elif rows_E is None and self._remap_handle is not None:
            self._remap_handle.remove()
            self._remap_handle = None

    @property
    def remapped(self) -> bool:
        return self._row_to_expert is not None

    @property
    def width(self) -> int:
        """D of the experts' input."""
        return self.experts.down_proj.shape[2 if self.transposed else 1]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored."""
        return sum(p.numel() * p.element_size() for p in self.stacked()) // len(self)

    @property
    def cost_E(self) -> Tensor:
        """FLOPs per token of each expert, float32 [E]."""
        return torch.full((len(self),), 2.0 * (sum(p.numel() for p in self.stacked()) // len(self)))

    @property
    def bytes_E(self) -> Tensor:
        """Bytes of each expert's own weights, float64 [E]."""
        return torch.full((len(self),), float(self.expert_bytes), dtype=torch.float64)

    def stacked(self) -> list[Tensor]:
        """The stored tensors whose first axis is the expert."""
        own = list(self.experts.parameters(recurse=False))
        if not own:  # the weights of one of our layers are its bank's
            own = [self.experts.gate_up_proj, self.experts.down_proj]
        return [p for p in own if p.dim() >= 2 and p.shape[0] == len(self)]

    def _halves(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return gate_up[::2], gate_up[1::2]
        half = gate_up.shape[0] // 2
        return gate_up[:half], gate_up[half:]

    def _index(self, e: int) -> int:
        if not -len(self) <= e < len(self):
            raise IndexError(f"{self.name} has {len(self)} experts: no expert {e}")
        return e % len(self)

    def _readable(self) -> None:
        down = self.experts.down_proj
        if hasattr(self.experts, "factors"):
            raise BadInput(f"{self.name}: its experts are held as factors, not as matrices: read `block.experts.factors`")
        if down.is_meta:
            raise BadInput(f"{self.name}: its weights are on the meta device (offloaded or not loaded); load them first")
        if down.element_size() < 2:
            raise BadInput(f"{self.name}: its weights are stored as {down.dtype} with scales; load the model dequantised")
