"""A decoding step of a stack of MoE decoder layers on a CPU as one pass: nothing but the passes of its parts, without Python
between them, which takes a third of such a step where weights are in few bits.

The layers are pre-norm: attention, then a softmax top-k router and SwiGLU experts, with a residual around each. Twin: the
layers' own forward.

Shape legend: L layers, D model width, E experts, K slots, G key-value heads, W head width, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels import route
from moesaic.kernels.attention_step import AttentionStep
from moesaic.kernels.few_rows import suits
from moesaic.kernels.memory import scratch
from moesaic.kernels.quantized import QuantizedBank
from moesaic.kernels.weights import Form, Weights


@dataclass(frozen=True, eq=False)
class LayerStep:
    """One layer's parts; `experts` are (gate_up, down) in bf16 or a bank in few bits."""

    norm: Tensor
    attention: AttentionStep
    second_norm: Tensor
    router: Tensor
    experts: tuple[Tensor, Tensor] | QuantizedBank


@dataclass(frozen=True, eq=False)
class StackStep:
    """The layers in order, and what they have in common. `form` is what the experts compute around their products."""

    layers: tuple[LayerStep, ...]
    eps: float
    slots: int
    normalise: bool
    round_weights: bool
    """Routers return their weights in bf16."""
    form: Form

    @cached_property
    def suits(self) -> bool:
        """Whether the pass can take these layers: all of one shape and one kind."""
        return (
            bool(self.layers) and len({self._kind(layer) for layer in self.layers}) == 1 and all(map(self._fits, self.layers))
        )

    def _kind(self, layer: LayerStep) -> Any:
        a = layer.attention
        attention = (a.q.shape, a.k.shape, a.width, a.scale, a.eps, None if a.q_norm is None else a.q_norm.numel())
        if isinstance(layer.experts, QuantizedBank):
            shape: Any = (len(layer.experts.experts), layer.experts.experts[0].gate_up_shape, layer.experts.forms)
        else:
            shape = tuple(weight.shape for weight in layer.experts)
        return attention, shape, layer.router.shape

    def _fits(self, layer: LayerStep) -> bool:
        norms = all(n.dtype is torch.bfloat16 and n.is_cpu and n.is_contiguous() for n in (layer.norm, layer.second_norm))
        if isinstance(layer.experts, QuantizedBank):
            experts = layer.experts.suits_one_token(self.form)
        else:
            experts = suits(Weights(*layer.experts, self.form), torch.bfloat16)
        return norms and layer.attention.suits and route.suits(layer.router, self.slots) and experts

    @cached_property
    def _fixed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int, int, int]:
        """Addresses per layer, its matrices, its experts' table, the packings; words and bytes of prepared activations."""
        first = self.layers[0]
        rows, matrices, tables = [], [], []
        for layer in self.layers:
            a = layer.attention
            norms = [0 if norm is None else norm.data_ptr() for norm in (a.q_norm, a.k_norm)]
            plain = [0, 0] if isinstance(layer.experts, QuantizedBank) else [weight.data_ptr() for weight in layer.experts]
            rows.append([layer.norm.data_ptr(), layer.second_norm.data_ptr(), *norms, layer.router.data_ptr(), 0, 0, *plain, 0])
            matrices.append([matrix.row_6 for matrix in (a.q, a.k, a.v, a.o)])
            tables.append(layer.experts.table[0] if isinstance(layer.experts, QuantizedBank) else np.zeros((1, 6), np.int64))
        forms, x_words, a_stride = np.zeros((1, 4), np.int64), 32, 64
        if isinstance(first.experts, QuantizedBank):
            _, forms, x_words, a_stride = first.experts.table
        words = max(first.attention.q.words(1), first.attention.o.words(1))
        return np.array(rows), np.array(matrices), np.stack(tables), forms, words, x_words, a_stride

    def __call__(
        self, x_1D: Tensor, cos_W: Tensor, sin_W: Tensor, caches: Sequence[tuple[Tensor, Tensor]], length: int
    ) -> Tensor:  # fmt: skip
        """The hidden state after the last layer, of x's shape. A layer's keys and values are contiguous [G, room, W], with
        a room of its own; position `length` - 1 is written."""
        from moesaic.kernels.compiled import pool
        from moesaic.kernels.compiled.stack_step import run

        layers_LC, matrices, tables, forms, words, x_words, a_stride = self._fixed
        layers_LC = layers_LC.copy()
        layers_LC[:, [5, 6, 9]] = [(keys.data_ptr(), values.data_ptr(), keys.shape[-2]) for keys, values in caches]
        a, first = self.layers[0].attention, self.layers[0]
        experts, dim = first.router.shape
        inner = (
            first.experts.experts[0].down_shape[1] if isinstance(first.experts, QuantizedBank) else first.experts[1].shape[2]
        )
        y_1D, cos_W, sin_W = x_1D.contiguous().clone(), cos_W.contiguous(), sin_W.contiguous()
        held = scratch("stack_step", 1, 2 * dim + 2 * (a.heads + a.groups) * a.width, torch.bfloat16)
        logits_E, weights_K = y_1D.new_empty(experts), torch.empty(self.slots)
        ids_K = torch.empty(self.slots, dtype=torch.int64)
        run(
            y_1D.data_ptr(), layers_LC, matrices, tables, forms, scratch("stored_matrix", 1, words, torch.int16)[0].numpy(),
            scratch("codes_x", 1, x_words, torch.int16)[0].numpy(),
            scratch("codes_prepared", 1, self.slots * a_stride // 2, torch.int16)[0].numpy(), a_stride,
            a.q_norm is not None and a.q_norm.numel() == a.width, self.eps, a.eps, cos_W.data_ptr(), sin_W.data_ptr(),
            length, a.heads, a.groups, a.width, dim, a.scale, experts, self.slots, inner,
            self.normalise, self.round_weights, held.data_ptr(), logits_E.data_ptr(), weights_K.data_ptr(), ids_K.data_ptr(),
            pool.join(),
        )  # fmt: skip
        return y_1D
