"""What a loaded model is: architecture, layers, experts, bytes, and the kernels that will run its experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import NotMoE
from moesaic.serving.rounding import Rounding, rounding_of

SMALL = 64_000_000
"""Active bytes per token below which one thread decodes fastest."""


def describe(model: Any, source: Any = None, rounding: Rounding | None = None) -> dict[str, Any]:
    """The facts that `moesaic run` prints before its first token; a dense model has no layers of experts.

    `exact`: whether the weights are those of the checkpoint, which rounded experts are not, of a packed folder or rounded
    while loading (`rounding`). `total_bytes`: as stored there.
    """
    from moesaic.view import view

    facts: dict[str, Any] = {
        "architecture": type(model).__name__,
        "layers": 0,
        "experts": 0,
        "top_k": 0,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": str(next(model.parameters()).device),
        "total_bytes": _bytes(model, resident=False),
        "resident_bytes": _bytes(model, resident=True),
        "exact": _exact(model, source),
        "kernels": [],
    }
    try:
        blocks = view(model)
    except NotMoE:
        return facts
    facts.update({k: v for k, v in blocks.summary().items() if k in ("layers", "experts", "top_k", "expert_bytes")})
    facts["active_parameters"] = _active(facts["parameters"], blocks)
    facts["kernels"] = _kernels(model, blocks[0])
    packed = rounding_of(source)
    if packed is not None:
        facts["total_bytes"] += packed.expert_bytes - _matrix_bytes(model)
    rounding = rounding or packed
    if rounding is not None:
        facts["exact"], facts["rounding"] = False, rounding.row()
        facts["expert_bytes"] = rounding.expert_bytes
        facts["resident_bytes"] += sum(module.stored.nbytes for module in model.modules() if hasattr(module, "stored"))
        facts["resident_bytes"] += sum(_record_bytes(block.experts) for block in blocks)
    return facts


def _matrix_bytes(model: nn.Module) -> int:
    """Of all experts' stacked matrices, in memory or not."""
    from moesaic.view.discover import expert_parameters

    own = model.state_dict(keep_vars=True)
    return sum(matrix.nbytes for matrix in {id(own[name]): own[name] for name in expert_parameters(model)}.values())


def _record_bytes(experts: nn.Module) -> int:
    """Of the records that stand in for a module's matrices."""
    from moesaic.view.implementation import STREAMED

    bank = getattr(getattr(experts, STREAMED, None), "bank", None)
    return 0 if bank is None else bank.nbytes


def _bytes(model: nn.Module, resident: bool) -> int:
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    return sum(t.numel() * t.element_size() for t in tensors if not (resident and t.is_meta))


def _active(parameters: int, blocks: Any) -> int:
    """Parameters that one token touches: all but the experts that it does not choose."""
    idle = 0
    for block in blocks:
        of_experts = sum(p.numel() for p in block.experts.parameters()) or sum(p.numel() for p in block.bank.stacked())
        idle += of_experts * (block.num_experts - block.top_k) // block.num_experts
    return parameters - idle


def _exact(model: Any, source: Any) -> bool:
    """False when the weights in memory are not those in the file: a narrower dtype was asked for."""
    stored = _stored_dtypes(Path(source)) if source is not None and Path(source).is_dir() else set()
    kept = {"F32": 24, "BF16": 8, "F16": 11, "F64": 53}
    digits = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11, torch.float64: 53}
    held = digits.get(next(model.parameters()).dtype, 0)
    # bf16 into fp16 keeps the digits but not the range.
    ranged = next(model.parameters()).dtype is torch.float16 and "BF16" in stored
    return not ranged and all(held >= kept[name] for name in stored if name in kept)


def _stored_dtypes(folder: Path) -> set[str]:
    from safetensors import safe_open

    found = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found |= {handle.get_slice(name).get_dtype() for name in handle.keys()}  # noqa: SIM118
    return found


def _kernels(model: Any, block: Any) -> list[dict[str, str]]:
    """Backend of the experts and the reason for it, as the dispatcher would choose now."""
    name = getattr(model.config.get_text_config(), "_experts_implementation", None) or "eager"
    if name != "moesaic":
        return [{"backend": name, "reason": "transformers' own, as asked with --experts"}]
    from moesaic.kernels import QuantizedBank, Weights, choose
    from moesaic.view.implementation import STREAMED, form_of

    if isinstance(getattr(getattr(block.experts, STREAMED, None), "bank", None), QuantizedBank):
        return [{"backend": "cpu", "reason": "experts in few bits, computed from their codes"}]

    experts = block.experts
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    down = experts.down_proj
    if up.is_meta:  # streamed: they compute on the CPU, and kernels look at shapes only
        up, down = (torch.empty(1, 1, 1, dtype=up.dtype).expand(t.shape) for t in (up, down))
    weights = Weights(up, down, form_of(experts), experts.is_transposed)
    choice = choose(torch.empty(1, block.width, dtype=up.dtype, device=up.device), weights, needs_grad=False)
    return [{"backend": choice.backend, "reason": choice.reason}]


def allow_packing(model: Any) -> int:
    """Grant the CPU kernels a second, faster copy of the experts where at most half the free memory goes to it.

    Returns the bytes granted; 0 where there is no room, no CPU or no experts.
    """
    from moesaic.kernels import allow_packing as grant
    from moesaic.view import view

    try:
        blocks = view(model)
    except NotMoE:
        return 0
    wanted = sum(block.expert_bytes * block.num_experts for block in blocks)
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    granted = wanted if on_cpu and wanted <= _free_memory() // 2 else 0
    grant(granted)
    return granted


def widen(model: Any) -> bool:
    """Turn a 16-bit model on a CPU into float32 where that takes at most a quarter of the free memory; True when done.

    Every stored value stays exactly what it was. A batch is as fast there, and its rows no longer round differently with
    the company they are in.
    """
    tensors = list(model.parameters())
    narrow = {t.dtype for t in tensors} & {torch.bfloat16, torch.float16}
    if not narrow or any(t.device.type != "cpu" for t in tensors):
        return False
    if 4 * sum(t.numel() for t in tensors) > _free_memory() // 4:
        return False
    model.float()
    return True


def choose_threads(facts: dict[str, Any], asked: int | None) -> tuple[int, str]:
    """Set torch's CPU threads; returns their number and why.

    A token of a small model is hundreds of products of microseconds each: handing them between threads costs more than
    it saves, and twenty times as much when another process holds one of the cores.
    """
    if asked is not None:
        torch.set_num_threads(asked)
        return asked, "as asked"
    active = facts["total_bytes"] * facts.get("active_parameters", facts["parameters"]) / facts["parameters"]
    if facts["device"] == "cpu" and active < SMALL:
        torch.set_num_threads(1)
        return 1, "a token reads too little to share between cores"
    return torch.get_num_threads(), "all cores"


def packed_bytes() -> int:
    """Bytes of the packed copies made so far."""
    from moesaic.kernels import packing_state

    return packing_state()["held_bytes"]


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
