"""Models whose decoding step runs all decoder layers as one pass (kernels/stack_step.py), found by what they are and by trial.

A model qualifies if every layer has two norms, an attention with a quick step, a quick router and SwiGLU experts in memory,
and nothing else, and if a step of its own after a few tokens gives what the pass gives. Its class becomes a subclass of what
it was; whatever is no such step goes to its own forward: more tokens or sequences, padding, gradients, another cache, outputs
that are asked for besides the last hidden state, and hooks on any of its parts (traces, policies), which the pass would not
call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels.quantized import QuantizedBank
from moesaic.kernels.stack_step import LayerStep, StackStep
from moesaic.view import implementation, shared_rows
from moesaic.view.quick_attention import current_step, one_more
from moesaic.view.quick_router import quick_convention

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
TOLERANCE = 2.0**-5
"""Of the hidden state's length, after all layers."""


def quicken_stack(model: Any) -> bool:
    """Give the module that holds `layers` its quick step; False where it has none."""
    inner = next((module for module in model.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList)), None)
    if inner is None or not all(hasattr(inner, name) for name in ("embed_tokens", "rotary_emb", "norm")):
        return False
    own = getattr(type(inner), "quick_own", type(inner))
    inner.quick_plan, inner.__class__ = None, own
    plan = _Plan.of(inner)
    if plan is None or not _same(inner, plan):
        return False
    inner.quick_plan = plan

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = None if args else _own_step(self, kwargs)
        if layers is None:
            return own.forward(self, *args, **kwargs)
        if self.quick_plan.stale():
            self.__class__ = own
            quicken_stack(self)
            return self(*args, **kwargs)
        return self.quick_plan.output(kwargs["input_ids"], kwargs.get("position_ids"), kwargs["past_key_values"], layers)

    kind = {"forward": forward, "quick_own": own, "__module__": own.__module__, "__qualname__": own.__qualname__}
    inner.__class__ = type(own.__name__, (own,), kind)
    return True


class _Plan:
    """The step of a model, what it was made from, and what would make it wrong."""

    def __init__(self, inner: Any, step: StackStep) -> None:
        self.inner: list[Any] = [inner]  # in a list: a module would become its own child
        self.step = step
        self.made: Any = None
        """The class of the model's output."""
        parts = [module for layer in inner.layers for module in layer.modules()]
        self.hooks = [hooks for module in parts for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.weights = [(m._parameters, name) for m in parts for name, held in m._parameters.items() if held is not None]
        self.at = self._addresses()
        self.tree = [(m._modules, name, part) for m in [inner.layers, *parts] for name, part in m._modules.items()]

    @classmethod
    def of(cls, inner: Any) -> _Plan | None:
        made = [_layer_step(layer) for layer in inner.layers]
        layers = [step for step in made if step is not None]
        if not layers or len(layers) < len(made):
            return None
        first = inner.layers[0]
        router, eps = first.mlp.gate, {_eps(norm) for layer in inner.layers for norm in _norms(layer)}
        conventions = {quick_convention(layer.mlp.gate) for layer in inner.layers}
        forms = [implementation.form_of(layer.mlp.experts) for layer in inner.layers]
        if len(eps) > 1 or len(conventions) > 1 or not all(form.swiglu for form in forms):
            return None
        convention = conventions.pop()
        assert convention is not None  # _layer_step has asked
        normalise, dtype = convention
        step = StackStep(tuple(layers), eps.pop(), router.top_k, normalise, dtype is torch.bfloat16, forms[0])
        return cls(inner, step) if step.suits else None

    def _addresses(self) -> list[int]:
        return [weights[name].data_ptr() for weights, name in self.weights]

    def stale(self) -> bool:
        """Whether a weight or a module was replaced since."""
        return self._addresses() != self.at or any(held.get(name) is not part for held, name, part in self.tree)

    def output(self, ids_11: Tensor, positions_11: Tensor | None, cache: Any, layers: list[Any]) -> Any:
        inner = self.inner[0]
        x_11D = inner.embed_tokens(ids_11)
        held = [one_more(layer) for layer in layers]
        length = held[0][2]
        if positions_11 is None:
            positions_11 = torch.tensor([[length - 1]])
        cos, sin = inner.rotary_emb(x_11D, positions_11)
        x_11D = self.step(x_11D, cos, sin, [(keys, values) for keys, values, _ in held], length)
        return self.made(last_hidden_state=inner.norm(x_11D), past_key_values=cache)


def _own_step(self: Any, kwargs: dict[str, Any]) -> list[Any] | None:
    """The cache's layers if this call is a step that the pass takes."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    ids, cache, mask = kwargs.get("input_ids"), kwargs.get("past_key_values"), kwargs.get("attention_mask")
    known = {"input_ids", "past_key_values", "attention_mask", "position_ids", "use_cache"}
    if (
        ids is None
        or ids.numel() != 1
        or type(cache) is not DynamicCache
        or len(cache.layers) != len(self.layers)
        or kwargs.get("use_cache") is False
        or any(value is not None and value is not False for name, value in kwargs.items() if name not in known)
        or self.training
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or any(self.quick_plan.hooks)
        or any(getattr(self.config, name, False) for name in OUTPUTS)
    ):
        return None
    layers: list[Any] = cache.layers
    shapes = set()
    layer: Any
    for layer in layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.keys.dtype is not torch.bfloat16:
            return None
        shapes.add(layer.keys.shape)
    shape = shapes.pop()
    if shapes or shape[0] != 1 or (mask is not None and (mask.shape != (1, shape[2] + 1) or not bool(mask.all()))):
        return None
    return layers


def _norms(layer: Any) -> tuple[Any, Any]:
    return layer.input_layernorm, layer.post_attention_layernorm


def _eps(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _layer_step(layer: Any) -> LayerStep | None:
    if {name for name, _ in layer.named_children()} != LAYER or not all(
        getattr(norm, "quick", False) for norm in _norms(layer)
    ):
        return None
    attention, mlp = current_step(layer.self_attn), layer.mlp
    if attention is None or {name for name, _ in mlp.named_children()} != {"gate", "experts"}:
        return None
    experts: Any = mlp.experts
    if (
        quick_convention(mlp.gate) is None
        or getattr(experts, "is_transposed", False)
        or not getattr(experts, "has_gate", False)
    ):
        return None
    if getattr(experts, shared_rows.MAP, None) is not None:
        return None  # the router's ids are of rows
    held = getattr(experts, implementation.STREAMED, None)
    bank = getattr(held, "bank", None)
    if held is not None and not isinstance(bank, QuantizedBank):
        return None  # on disk
    stored = bank if bank is not None else (experts.gate_up_proj.detach(), experts.down_proj.detach())
    norms = [norm.weight.detach() for norm in _norms(layer)]
    return LayerStep(norms[0], attention, norms[1], mlp.gate.weight.detach(), stored)


def _same(inner: Any, plan: _Plan) -> bool:
    """Whether a step of the model's own after three tokens gives the pass's hidden state."""
    from transformers.cache_utils import DynamicCache

    vocabulary = inner.embed_tokens.num_embeddings
    ids = (torch.arange(4) * (vocabulary // 5) + 1)[None] % vocabulary
    caches = [DynamicCache(), DynamicCache()]
    training = inner.training
    try:
        with torch.inference_mode():
            inner.eval()
            for cache in caches:
                inner(input_ids=ids[:, :3], past_key_values=cache, use_cache=True)
            want = inner(input_ids=ids[:, 3:], past_key_values=caches[0], use_cache=True)
            plan.made = type(want)
            got = plan.output(ids[:, 3:], None, caches[1], caches[1].layers)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError):
        return False
    finally:
        inner.train(training)
    a, b = got.last_hidden_state.float(), want.last_hidden_state.float()
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
