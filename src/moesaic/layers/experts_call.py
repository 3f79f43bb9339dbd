"""The one call that every transformers MoE makes of its experts, made by our layer too, so that the view opens it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from moesaic.core.routing import Dispatch
from moesaic.experts.gated_mlp import GatedMLP


class ExpertsCall(nn.Module):
    """`call(x_TD, ids_TK, weights_TK) -> y_TD` over the bank of `layer`, with the names and flags of transformers' experts.

    The weights stay the bank's (nothing of this module is in a state dict). Only a plain `gated_mlp` bank has this layout;
    over any other, `down_proj` is None, and the view finds no experts here.
    """

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    config = SimpleNamespace(_experts_implementation="moesaic")
    """Whoever edits ids and weights on their way here may leave slots empty."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = [layer]  # in a list: the layer holds this module, not the other way round

    @property
    def bank(self) -> GatedMLP | None:
        """The layer's bank, None when it is of another kind or maps several router rows to one expert."""
        bank: Any = self._layer[0].bank
        return bank if type(bank) is GatedMLP and bank.row_to_expert is None else None

    @property
    def gate_up_proj(self) -> Tensor | None:
        return None if self.bank is None else self.bank.gate_up_EHD

    @property
    def down_proj(self) -> Tensor | None:
        return None if self.bank is None else self.bank.down_EDI

    @property
    def act_fn(self) -> Any:
        return "silu" if self.bank is None else self.bank.act

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        bank: Any = self._layer[0].bank
        return bank.run(hidden_states, Dispatch.of_slots(top_k_index, top_k_weights, bank.num_experts))
