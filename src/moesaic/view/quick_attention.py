"""Attention modules whose decoding step runs as one pass (kernels/attention_step.py), found by what they are and by trial.

A module qualifies if it has the projections, norms and scale that the pass knows, and if a step of its own on random numbers
gives what the pass gives, caches included; then its class becomes a subclass of what it was. Whatever is no such step (more
tokens, more sequences, a mask, gradients, another cache) goes to its own forward.

Keys and values grow in place: transformers' cache copies both whole for every token.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moesaic.kernels import attention
from moesaic.kernels.attention_step import AttentionStep
from moesaic.kernels.stored_matrix import StoredMatrix

LEAST_ROOM = 64
"""Positions that a growing cache gains at least; else a quarter of what it holds."""

TOLERANCE = 2.0**-6
"""Of a vector's length: a few roundings of bf16 numbers that sums in another order turn the other way."""

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")

_ROOM: WeakKeyDictionary[Any, tuple[Tensor, Tensor]] = WeakKeyDictionary()
"""A cache's layer -> the buffers whose first positions are its keys and values."""


def quicken_attention(module: Any) -> bool:
    """Give an attention module its quick step; False where it has none. Doing it again looks at its matrices again."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    step = _step_of(module)
    own = getattr(type(module), "quick_own", type(module))
    module.__class__ = own
    if step is None or not step.suits or not _same(module, step, DynamicCache):
        module.quick_step = None
        return False
    module.quick_step, module.quick_at = step, _addresses(module)
    # The step calls none of the module's parts: who listens to one, or changes what it gives, must be called all the same.
    module.quick_hooks = [hooks for part in module.children() for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x, cache = kwargs.get("hidden_states"), kwargs.get("past_key_values")
        positions = kwargs.get("position_embeddings")
        layer: Any = (
            cache.layers[self.layer_idx]
            if type(cache) is DynamicCache and self.layer_idx < len(cache.layers) and not args
            else None
        )
        if (
            x is None
            or positions is None
            or type(layer) is not DynamicLayer
            or layer.keys is None
            or x.shape[:2] != (1, 1)
            or x.dtype is not torch.bfloat16
            or kwargs.get("attention_mask") is not None
            or self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or any(self.quick_hooks)
            or self.config._attn_implementation != attention.NAME
            or layer.keys.shape[0] != 1
            or layer.keys.dtype is not torch.bfloat16
        ):
            return own.forward(self, *args, **kwargs)
        step = current_step(self)
        if step is None:
            return own.forward(self, *args, **kwargs)
        cos, sin = positions
        return step(x, cos, sin, *one_more(layer)), None

    kind = {"forward": forward, "quick_own": own, "__module__": own.__module__, "__qualname__": own.__qualname__}
    module.__class__ = type(own.__name__, (own,), kind)
    return True


def current_step(module: Any) -> AttentionStep | None:
    """The module's quick step for the weights that it holds now."""
    step = getattr(module, "quick_step", None)
    if step is not None and _addresses(module) != module.quick_at:
        return module.quick_step if quicken_attention(module) else None
    return step


def _addresses(module: Any) -> list[int]:
    parts = [getattr(module, name, None) for name in PARTS]
    held = [part.stored.held if hasattr(part, "stored") else part.weight for part in parts if part is not None]
    return [tensor.data_ptr() for tensor in held]


def one_more(layer: Any) -> tuple[Tensor, Tensor, int]:
    """Buffers with room for one position more than the layer holds, which it holds from now on, and its length then."""
    length = layer.keys.shape[2] + 1
    held = _ROOM.get(layer)
    for buffer, tensor in zip(held or (), (layer.keys, layer.values), strict=False):
        if (
            buffer.data_ptr() != tensor.data_ptr()
            or buffer.stride() != tensor.stride()
            or buffer.shape[1::2] != tensor.shape[1::2]
        ):
            held = None
    if held is None or held[0].shape[2] < length:
        _, groups, _, width = layer.keys.shape
        room = length + max(LEAST_ROOM, length // 4)
        held = layer.keys.new_empty(1, groups, room, width), layer.values.new_empty(1, groups, room, width)
        for buffer, tensor in zip(held, (layer.keys, layer.values), strict=True):
            buffer[:, :, : length - 1] = tensor
        _ROOM[layer] = held
    layer.keys, layer.values = held[0].narrow(2, 0, length), held[1].narrow(2, 0, length)
    return held[0], held[1], length


def _step_of(module: Any) -> AttentionStep | None:
    parts = [getattr(module, name, None) for name in PARTS[:4]]
    width, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
    norms = [getattr(module, name, None) for name in PARTS[4:]]
    if not isinstance(width, int) or not isinstance(scale, float) or not isinstance(getattr(module, "layer_idx", None), int):
        return None
    matrices = [stored_matrix(part) for part in parts]
    q, k, v, o = matrices
    if q is None or k is None or v is None or o is None:
        return None
    if norms == [None, None]:
        return AttentionStep(q, k, v, o, width, scale)
    weights = [getattr(norm, "weight", None) for norm in norms]
    eps = [getattr(norm, "variance_epsilon", getattr(norm, "eps", None)) for norm in norms]
    plain = all(isinstance(w, Tensor) and w.dtype is torch.bfloat16 and w.is_cpu and w.dim() == 1 for w in weights)
    if not plain or eps[0] != eps[1] or not isinstance(eps[0], float):
        return None
    return AttentionStep(q, k, v, o, width, scale, weights[0], weights[1], eps[0])


def stored_matrix(module: Any) -> StoredMatrix | None:
    """What a linear layer without bias multiplies with, if it is one that a pass can read."""
    if not isinstance(module, nn.Linear) or module.bias is not None:
        return None
    held = getattr(module, "stored", None)
    if held is not None:
        return held
    weight = module.weight
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    return StoredMatrix(weight.detach(), (weight.shape[0], weight.shape[1]))


def _same(module: Any, step: AttentionStep, cache_class: Any) -> bool:
    """Whether the module's own step on random numbers gives the pass's output, key and value."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    angle = torch.rand(step.width // 2, generator=random) * 6
    cos, sin = (torch.cat([turn, turn]).bfloat16().view(1, 1, -1) for turn in (angle.cos(), angle.sin()))
    x, past = draw(1, 1, step.q.shape[1]), [draw(1, step.groups, 3, step.width) for _ in range(2)]
    caches = [cache_class(), cache_class()]
    training = module.training
    try:
        with torch.inference_mode():
            for cache in caches:
                cache.update(past[0].clone(), past[1].clone(), module.layer_idx)
            module.eval()
            want = module(
                hidden_states=x, position_embeddings=(cos, sin), attention_mask=None, past_key_values=caches[0],
            )  # fmt: skip
            got = step(x, cos, sin, *one_more(caches[1].layers[module.layer_idx]))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False  # it asks for something else than a step gives it
    finally:
        module.train(training)
    own = caches[0].layers[module.layer_idx]
    layer = caches[1].layers[module.layer_idx]
    pairs = [(layer.keys, own.keys), (layer.values, own.values)]
    if not isinstance(want, tuple) or len(want) != 2 or not isinstance(want[0], Tensor):
        return False
    return all(a.shape == b.shape and _near(a, b) for a, b in [*pairs, (got, want[0])])


def _near(got: Tensor, want: Tensor) -> bool:
    return bool((got.float() - want.float()).norm() <= TOLERANCE * want.float().norm())
