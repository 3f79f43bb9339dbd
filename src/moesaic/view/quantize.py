"""A live model in few bits: its experts, behind the experts call of any architecture that the view opens, and on request
its linear layers.

A recipe is `int8`, `int4` or `int2` (groups of 64, or `int4:group=32`), or `mixed:high=4,low=2,share=0.25`: the `share` of all
experts that matter least, over all layers, in `low` bits and the others in `high`. That is EdgeMoE's rule (card "EdgeMoE:
per-expert bit-width and path dictionary" of serving-and-scale.md) with the share given instead of searched, and with how
often an expert is chosen, which a trace tells, standing in for the accuracy lost without it, which costs an evaluation per
expert; Fate's default is 4 and 2 bits with a share of 0.25. With `linear=8` (or 4, or 2; as in `int4:linear=8`) the linear
layers of attention, shared experts, dense MLPs and the head are rounded too.

Biases, routers, embeddings and everything else stay as they are. Shape legend: L layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import Packing, QuantizedBank, dispatch_slots, quantize_bank
from moesaic.view import implementation
from moesaic.view.block import Block, View
from moesaic.view.stored_linear import quantize_linears
from moesaic.view.tap import Choice, Handle


@dataclass(frozen=True)
class Recipe:
    """`low` bits for a `share` of the experts, the least important ones, `high` for the others."""

    high: int
    low: int
    share: float
    group_size: int = 64
    linear: int | None = None
    """Bits of the linear layers; None leaves them."""

    def __post_init__(self) -> None:
        if self.linear is not None:
            Packing(self.linear, self.group_size)
        Packing(self.high, self.group_size)
        Packing(self.low, self.group_size)
        if not 0 <= self.share <= 1 or self.low > self.high:
            raise BadInput(f"mixed widths: a share from 0 to 1 and low at most high; got {self}")

    @property
    def mixed(self) -> bool:
        """Whether it takes an importance to tell the experts apart."""
        return self.low != self.high and 0 < self.share < 1


def parse(text: str) -> Recipe:
    """`int4`, `int8:group=32,linear=8`, `mixed:high=8,low=4,share=0.25,group=64`. Raises BadInput for anything else."""
    name, _, rest = text.partition(":")
    known = {"group": "64", "linear": ""}
    if name == "mixed":
        known |= {"high": "4", "low": "2", "share": "0.25"}
    for option in filter(None, rest.split(",")):
        key, equals, value = option.partition("=")
        if key not in known or not equals:
            raise BadInput(f"{text!r}: {name} has no option {option!r}; it knows {', '.join(known)}")
        known[key] = value
    widths = {"int8": 8, "int4": 4, "int2": 2}
    if name != "mixed" and name not in widths:
        raise BadInput(f"{text!r}: one of int8, int4, int2, mixed, such as int4:group=32 or mixed:high=8,low=4,share=0.25")
    try:
        group, linear = int(known["group"]), int(known["linear"]) if known["linear"] else None
        if name == "mixed":
            return Recipe(int(known["high"]), int(known["low"]), float(known["share"]), group, linear)
    except ValueError as error:
        raise BadInput(f"{text!r}: {error}") from error
    return Recipe(widths[name], widths[name], 0.0, group, linear)


def bits_by_importance(importance: Sequence[Tensor], recipe: Recipe) -> list[list[int]]:
    """Bits of each layer's experts. `importance`: a vector per layer, comparable between layers; ties go to the earlier
    layer and expert, which is lowered first."""
    flat = torch.cat([torch.as_tensor(of_layer, dtype=torch.float64) for of_layer in importance])
    bits = torch.full(flat.shape, recipe.high)
    bits[flat.argsort(stable=True)[: round(recipe.share * len(flat))]] = recipe.low
    return [part.tolist() for part in bits.split([len(of_layer) for of_layer in importance])]


@dataclass(frozen=True, eq=False)
class Quantized:
    """What `quantize_model` put in place: a bank per block, and what it saves."""

    banks: tuple[QuantizedBank, ...]
    stored_bytes: int
    """Bytes of the experts' matrices before."""
    linears: dict[str, int] | None = None
    """What `quantize_linears` said, where it ran."""

    @property
    def nbytes(self) -> int:
        """Bytes of the experts' matrices now, scales included."""
        return sum(bank.nbytes for bank in self.banks)

    @property
    def bits(self) -> list[tuple[int, ...]]:
        """Bits of each layer's experts, scales not counted."""
        return [bank.bits for bank in self.banks]


def quantize_model(model: nn.Module, recipe: str | Recipe = "int4", importance: Sequence[Tensor] | None = None) -> Quantized:
    """Replace every block's expert matrices (and linear layers, where the recipe says so) by quantised ones; the originals are
    let go and cannot be read any more.

    Args:
        model: loaded on the CPU with `experts_implementation="moesaic"` (what `moesaic.load` does); for inference only.
        recipe: see this file's head.
        importance: a vector of E numbers per block, for mixed widths: such as how often each expert was chosen.

    Raises BadInput for another implementation, experts elsewhere than on the CPU, and an importance that is missing or of
    another shape; nothing is replaced then.
    """
    recipe = parse(recipe) if isinstance(recipe, str) else recipe
    blocks = View(model)
    if recipe.mixed and importance is None:
        raise BadInput("mixed widths need an importance: a number per expert and layer, such as how often each is chosen")
    sizes = [block.num_experts for block in blocks]
    if importance is not None and [len(of_layer) for of_layer in importance] != sizes:
        raise BadInput(f"the importance is of {[len(of_layer) for of_layer in importance]} experts, the layers hold {sizes}")
    if getattr(cast(Any, model).config, "_experts_implementation", None) != implementation.NAME:
        raise BadInput('quantised experts run on our kernels: load the model with experts_implementation="moesaic"')
    for block in blocks:
        down = block.experts.down_proj
        if hasattr(block.experts, "factors"):
            raise BadInput(f"{block.name}: its experts are held as factors, which are not quantised")
        if down.device.type != "cpu" or down.element_size() < 2:
            raise BadInput(
                f"{block.name}: its experts are {down.dtype} on {down.device}: quantising takes 16 or 32 bits, on the CPU"
            )
    bits = bits_by_importance(importance, recipe) if importance is not None else [[_only(recipe)] * size for size in sizes]
    before = sum(matrix.nbytes for block in blocks for matrix in _matrices(block))
    linears = None if recipe.linear is None else quantize_linears(model, Packing(recipe.linear, recipe.group_size))
    banks = tuple(_replace(block, b, recipe.group_size) for block, b in zip(blocks, bits, strict=True))
    return Quantized(banks, before, linears)


def _only(recipe: Recipe) -> int:
    return recipe.low if recipe.share == 1 else recipe.high


def _names(block: Block) -> tuple[str, str]:
    return "gate_up_proj" if block.bank.gated else "up_proj", "down_proj"


def _matrices(block: Block) -> list[Tensor]:
    return [getattr(block.experts, name) for name in _names(block)]


def _replace(block: Block, bits: list[int], group_size: int) -> QuantizedBank:
    gate_up, down = _matrices(block)
    bank = quantize_bank(gate_up, down, bits, group_size, transposed=block.bank.transposed)
    for name, matrix in zip(_names(block), (gate_up, down), strict=True):
        setattr(block.experts, name, nn.Parameter(torch.empty_like(matrix, device="meta"), requires_grad=False))
    setattr(block.experts, implementation.STREAMED, Computed(block.experts, bank))
    return bank


class Computed:
    """What stands on an experts module instead of its matrices: see `implementation.STREAMED`."""

    def __init__(self, experts: Any, bank: QuantizedBank) -> None:
        self.experts, self.bank = experts, bank

    def __call__(self, x_TD: Tensor, dispatch: Dispatch, top_k_index: Tensor | None) -> Tensor:
        return self.bank.run(x_TD, dispatch, implementation.form_of(self.experts))

    def routed(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The same before pairs are sorted: a single token has a shorter way."""
        if x_TD.shape[0] == 1:
            y_1D = self.bank.one_token(x_TD, ids_TK, weights_TK, implementation.form_of(self.experts))
            if y_1D is not None:
                return y_1D
        return self(x_TD, dispatch_slots(ids_TK, weights_TK, self.bank.num_experts), ids_TK)


def chosen_counts(blocks: View) -> tuple[list[Tensor], list[Handle]]:
    """Counters that fill while the model runs, a vector per block, and the handles that end the counting."""
    counts = [torch.zeros(block.num_experts, dtype=torch.float64) for block in blocks]

    def watch(choice: Choice, block: Block) -> None:
        ids = choice.ids.reshape(-1)
        known = ids[(ids >= 0) & (ids < block.num_experts)].cpu()
        counts[at[block]] += torch.bincount(known, minlength=block.num_experts)

    at = {block: i for i, block in enumerate(blocks)}
    return counts, [block.on_choice(watch) for block in blocks]
