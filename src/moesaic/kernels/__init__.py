"""Grouped expert computation: a naive twin, a torch path, a CPU path, a Triton path, and one dispatcher."""

from moesaic.kernels.dispatch import choose, expert_mlp, expert_mlp_slots, expert_mlp_stored, explain
from moesaic.kernels.low_bits import Packing, Part, dequantize_matrix, parts, quantize_matrix, record_bytes
from moesaic.kernels.packing import PackedBank, allow_packing, pack, packing_state
from moesaic.kernels.quantized import QuantizedBank, QuantizedExpert, quantize_bank, run_quantized
from moesaic.kernels.slots import dispatch_slots
from moesaic.kernels.weights import Form, Weights

__all__ = [
    "Form",
    "PackedBank",
    "Packing",
    "Part",
    "QuantizedBank",
    "QuantizedExpert",
    "Weights",
    "allow_packing",
    "choose",
    "dequantize_matrix",
    "dispatch_slots",
    "expert_mlp",
    "expert_mlp_slots",
    "expert_mlp_stored",
    "explain",
    "pack",
    "packing_state",
    "parts",
    "quantize_bank",
    "quantize_matrix",
    "record_bytes",
    "run_quantized",
]
