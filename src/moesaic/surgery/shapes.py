"""What the blocks of a model are, by their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.layer import Facts
from moesaic.view import View
from moesaic.view.block import Block

GROUPS = ("n_group", "num_expert_group")
CHOSEN = ("topk_group",)


def facts_of(view: View) -> list[Facts]:
    """The numbers of every block of a model, which may be without memory."""
    found, uneven = [], len({block.num_experts for block in view}) > 1
    for number, block in enumerate(view):
        groups = _number(block, view.model, GROUPS)
        chosen = _number(block, view.model, CHOSEN)
        found.append(
            Facts(
                number, block.name, block.layer, block.num_experts, top_k_of(block, view.model), groups,
                chosen if groups > 1 else 1, block.bank.width, inner_of(block), block.expert_bytes, len(view),
                0 if block.row_map is None else block.rows, uneven,
            )
        )  # fmt: skip
    return found


def inner_of(block: Block) -> int:
    """I: the width inside an expert."""
    down: Tensor = block.experts.down_proj
    return down.shape[1 if block.bank.transposed else 2]


def top_k_of(block: Block, model: Any) -> int:
    """Experts per token, without running anything."""
    for holder in (block.router, block.parent, block.experts, model.config.get_text_config()):
        for name in (
            "top_k",
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_k",
            "top_k_experts",
            "moe_topk",
            "router_top_k",
        ):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise BadInput(f"{block.name}: it does not say how many experts it chooses per token")


def _number(block: Block, model: Any, names: Sequence[str]) -> int:
    for holder in (block.router, block.parent, model.config.get_text_config()):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return 1
