"""The peers of `bench layer`: transformers' own experts functions, and kt-kernel and ScatterMoE where they are installed.

Each becomes a layer (x [T, D], experts [T, K], weights [T, K]) -> y [T, D] over the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

LONGEST = {"transformers batched_mm": 16, "transformers eager": 4096}
"""Tokens beyond which a peer is left out: batched_mm copies an expert's weights for every pair."""


def runs(name: str, tokens: int, train: bool) -> bool:
    """Whether a contestant takes part: autograd over eager's slices writes a whole bank of zeros for every expert, which
    is 20x slower than anything else here and leaves memory in pieces for the others."""
    return tokens <= LONGEST.get(name, tokens) and not (train and name == "transformers eager")


def find(
    gate_up: Tensor, down: Tensor, slots: int, tokens: int, train: bool, notes: list[str]
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every peer that can run these weights here; a note for each that cannot."""
    found = {f"transformers {name}": _transformers(name, gate_up, down) for name in ("grouped_mm", "batched_mm", "eager")}
    if gate_up.device.type == "cpu":
        _add_kt_kernel(found, gate_up, down, slots, tokens, train, notes)
    else:
        _add_scattermoe(found, gate_up, down, notes)
    return found


def _transformers(name: str, gate_up: Tensor, down: Tensor):
    """The experts module of a stock SwiGLU MoE (OLMoE's) over our tensors, with that implementation."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    experts, _, width = gate_up.shape
    config = OlmoeConfig(
        hidden_size=width, intermediate_size=down.shape[2], num_experts=experts, num_experts_per_tok=1, num_hidden_layers=1
    )
    config._experts_implementation = name
    with torch.device("meta"):
        module = OlmoeSparseMoeBlock(config).experts
    del module.gate_up_proj, module.down_proj
    for weight_name, tensor in (("gate_up_proj", gate_up), ("down_proj", down)):
        setattr(module, weight_name, tensor)
    return lambda x, experts_TK, weights_TK: module(x, experts_TK, weights_TK)


def _add_kt_kernel(found: dict[str, Any], gate_up: Tensor, down: Tensor, slots, tokens, train, notes: list[str]) -> None:
    if gate_up.dtype != torch.bfloat16 or train:
        return
    if find_spec("kt_kernel") is None:
        notes.append("kt-kernel: not installed")
        return
    if not torch.cpu._is_amx_tile_supported():
        notes.append("kt-kernel: its bf16 kernel needs AMX, which this CPU lacks")
        return
    from kt_kernel import kt_kernel_ext

    experts, rows, width = gate_up.shape
    gate, up, down = gate_up[:, : rows // 2].contiguous(), gate_up[:, rows // 2 :].contiguous(), down.contiguous()
    pool = kt_kernel_ext.CPUInfer(torch.get_num_threads())
    config = kt_kernel_ext.moe.MOEConfig(experts, slots, width, rows // 2, 0)
    config.max_len = max(tokens, 512)
    config.gate_proj, config.up_proj, config.down_proj = gate.data_ptr(), up.data_ptr(), down.data_ptr()
    config.gate_scale = config.up_scale = config.down_scale = 0
    config.pool = pool.backend_
    moe = kt_kernel_ext.moe.AMXBF16_MOE(config)
    order = torch.arange(experts)
    pool.submit(moe.load_weights_task(order.data_ptr()))
    pool.sync()

    kept = (gate, up, down, config)  # the kernel holds bare pointers into these

    def layer(x: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        y, count = torch.empty_like(x), torch.tensor([x.shape[0]], dtype=torch.int32)
        ids, weights = experts_TK.contiguous(), weights_TK.float().contiguous()
        pointers = (ids.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr())
        pool.submit(moe.forward_task(count.data_ptr(), experts_TK.shape[1], *pointers, False))
        pool.sync()
        return y if kept else x

    found["kt-kernel"] = layer


def _add_scattermoe(found: dict[str, Any], gate_up: Tensor, down: Tensor, notes: list[str]) -> None:
    if find_spec("scattermoe") is None:
        notes.append("ScatterMoE: not importable (put its source tree on PYTHONPATH)")
        return
    from scattermoe.mlp import GLUMLP

    mlps: dict[int, Any] = {}

    def layer(x: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        experts, rows, width = gate_up.shape
        mlp = mlps.get(experts_TK.shape[1])
        if mlp is None:
            made = GLUMLP(
                input_size=width,
                hidden_size=rows // 2,
                num_experts=experts,
                top_k=experts_TK.shape[1],
                activation=torch.nn.SiLU(),
            )
            mlp = mlps[experts_TK.shape[1]] = made.to(gate_up.device, gate_up.dtype)
            # Its halves are [hidden, gate]: ours are [gate, up].
            halves = torch.cat([gate_up[:, rows // 2 :], gate_up[:, : rows // 2]], 1)
            mlp.experts.weight.data.copy_(halves)
            mlp.output_experts.weight.data.copy_(down)
        return mlp(x, weights_TK, experts_TK)

    found["ScatterMoE"] = layer
