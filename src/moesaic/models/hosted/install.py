"""Put registered routers into the blocks of a transformers model, from a spec that its configuration can keep.

Shape legend: T tokens, D width, E the block's experts, K slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MissingNeed
from moesaic.models.hosted.calls import GIVES, Calls
from moesaic.models.hosted.cheap import cheap_class
from moesaic.models.hosted.compressed import compressed_class
from moesaic.models.hosted.router import HostedRouter, hosted_class
from moesaic.routing.router import Router
from moesaic.view.block import Block, View

CHEAP = {"constants": 1, "copies": 1, "zeros": 1}
"""Options of the bank that can be put behind trained experts, and their defaults."""

COMPRESSED = "compressed_experts"
"""The change of a bank that leaves routers alone: `bank_options` are main, vectors (1 or 3), renormalise_main (0 or 1)."""


@dataclass
class Spec:
    """What is put in: enough to build it again over an untouched architecture. `layers` and `orders` go together.

    `router` is None where the blocks keep their own, and only their banks change.
    """

    router: str | None
    router_options: dict[str, Any] = field(default_factory=dict)
    bank: str | None = None
    bank_options: dict[str, int] = field(default_factory=dict)
    balance: dict[str, Any] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    orders: list[list[str]] = field(default_factory=list)
    """How each block's own router orders the tuple it returns."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Own:
    """A block's own router, as far as it must be known: a softmax top-k over one matrix."""

    weight_ED: Tensor
    k: int
    normalised: bool
    order: tuple[str, ...]


def own_router(block: Block) -> Own:
    """Read the block's router, by trial. Raises BadInput for one that is no softmax top-k over one matrix."""
    router, experts = block.router, block.num_experts
    if router is None:
        raise BadInput(f"{block.name} has no router module of its own to replace")
    weights = [p for p in router.parameters() if p.numel() > 1]
    why = f"{block.name}: its {type(router).__name__} is no softmax top-k over one matrix"
    if len(weights) != 1 or weights[0].dim() != 2 or weights[0].shape[0] != experts:
        raise BadInput(f"{why} (it has {len(weights)} tensors), so its rows mean something else to another router")
    weight_ED = weights[0].detach()
    random = torch.Generator().manual_seed(0)
    x_TD = torch.randn(7, weight_ED.shape[1], generator=random).to(weight_ED)
    try:
        with torch.no_grad():
            output = router(x_TD)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(f"{why} (it needs more than x: {str(error).splitlines()[0]})") from error
    order = _order(output, len(x_TD), experts)
    if order is None:
        raise BadInput(f"{why} (its output is not logits, weights and ids: the block selects elsewhere)")
    parts = dict(zip(order, output, strict=True))
    probs_TE = (x_TD.float() @ weight_ED.float().T).softmax(-1)
    ids_TK, weights_TK = parts["ids"], parts["weights"].float()
    best_TK = probs_TE.topk(ids_TK.shape[1], -1).values
    room = 2.0**-6 if weight_ED.dtype in (torch.bfloat16, torch.float16) else 1e-4
    for normalised, want_TK in ((True, best_TK / best_TK.sum(-1, keepdim=True)), (False, best_TK)):
        near = (weights_TK.sort(-1, descending=True).values - want_TK).norm() <= room * want_TK.norm()
        if bool(near) and ids_TK.shape[1] < experts:
            return Own(weight_ED, ids_TK.shape[1], normalised, order)
    raise BadInput(f"{why}: its weights are neither those probabilities nor the same divided by their sum")


def _order(output: Any, tokens: int, experts: int) -> tuple[str, ...] | None:
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(part, Tensor) for part in output):
        return None
    names = []
    for part in output:
        if not part.is_floating_point():
            names.append("ids")
        elif part.shape == (tokens, experts) and "logits" not in names:
            names.append("logits")
        else:
            names.append("weights")
    return tuple(names) if sorted(names) == ["ids", "logits", "weights"] else None


def build(spec: Spec, dim: int, experts: int) -> tuple[Router, int]:
    """The spec's router for one block, and the rows that the block's experts call must serve.

    Raises BadInput or MissingNeed, with the reason, for a router that these blocks cannot host.
    """
    assert spec.router is not None, "a spec without a router has none to build"
    entry = registry.get("routing", spec.router)
    name, kind = spec.router, cast(Any, entry.build)
    bank = kind.bank if spec.bank is None else spec.bank
    if bank not in ("gated_mlp", "zero_computation"):
        raise BadInput(f"router {name}, bank {bank}: trained experts can become gated_mlp (as they are) or zero_computation")
    unknown = sorted(set(spec.bank_options) - set(CHEAP if bank == "zero_computation" else ()))
    if unknown or any(not isinstance(n, int) or n < 0 for n in spec.bank_options.values()):
        raise BadInput(f"bank options {spec.bank_options}: bank {bank} takes here {', '.join(CHEAP) if unknown else 'counts'}")
    cheap = {**CHEAP, **spec.bank_options} if bank == "zero_computation" else {}
    rows = experts + sum(cheap.values())
    options = dict(spec.router_options)
    if cheap and "zero_computation" in entry.parameters:
        options |= {"zero_computation": sum(cheap.values()), "zeros": cheap["zeros"]}
    if kind.shared(dim, **{key: options[key] for key in options if key in entry.parameters}):
        raise BadInput(f"router {name} shares one module between all layers, which replacing routers block by block cannot")
    try:
        router = kind(dim, rows, **options)
    except TypeError as error:
        known = ", ".join(key for key in entry.parameters if key not in ("dim", "experts"))
        raise BadInput(f"router {name}: {error}; its options are {known}") from error
    missing = sorted(router.needs - GIVES)
    if missing:
        raise MissingNeed(f"router {name} needs {', '.join(missing)}, which a transformers decoder does not tell its routers")
    if not router.causal:
        raise BadInput(f"router {name} lets a token's routing see later tokens: not for a causal model")
    if router.no_cache:
        raise BadInput(f"router {name} cannot decode with the model's cache: {router.no_cache}")
    served = getattr(router, "true_experts", router.num_experts)
    if served != rows:
        raise BadInput(f"router {name} routes over {served} experts, the block serves {rows}")
    return router, rows


def check_form(router: Router, name: str, dim: int) -> None:
    """Raises BadInput for a router that returns no slots per token, which a transformers experts call asks for."""
    zeros_T, ones_T = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    ctx = RoutingContext(
        mode="eval", causal=True, threads_state=True, token_ids=zeros_T, positions=torch.arange(4), sequence_ids=zeros_T,
        mask=ones_T, generator=torch.Generator().manual_seed(0), step=0,
    )  # fmt: skip
    with torch.no_grad():
        routing = router(torch.randn(4, dim, generator=torch.Generator().manual_seed(0)), ctx)
    if routing.experts_TK is None:
        raise BadInput(
            f"router {name} gives no slots per token (pairs, merged parameters or keys), which the experts call asks for"
        )


def install(model: Any, blocks: Sequence[Block], spec: Spec, start: Callable[[Router, Block], None] | None = None) -> Any:
    """Replace the routers of `blocks` as the spec says; `start` may set a new router's weights from the block.

    Returns the handle of the hook that reads the decoder's calls.
    """
    calls = Calls()
    if spec.router is None:
        compress(blocks, spec)
    for block, order in zip(blocks, spec.orders, strict=True) if spec.router is not None else ():
        old, experts = cast(nn.Module, block.router), block.num_experts
        like = next(old.parameters())
        router, rows = build(spec, block.width, experts)
        if start is not None:
            start(router, block)
        kind: Any = hosted_class(_stock(type(old)))
        hosted = kind.__new__(kind)
        HostedRouter.__init__(
            hosted, router, calls, block.experts.config, order=tuple(order), experts=experts, rows=rows, layer=block.layer,
            balance=spec.balance,
        )  # fmt: skip
        _finished(hosted.to(device=like.device, dtype=like.dtype).train(old.training))
        name = next(name for name, child in block.parent.named_children() if child is old)
        setattr(block.parent, name, hosted)
        if rows > experts:
            cheap = {**CHEAP, **spec.bank_options}
            bank: Any = block.experts
            bank.__class__ = cheap_class(cast(Any, type(bank)))
            bank.add_cheap(block.width, cheap["constants"], cheap["copies"], like.dtype, like.device)
            for parameter in (bank.mix_C2D, bank.vector_CD):
                parameter._is_hf_initialized = True
    decoder = model.get_decoder()
    model._hosted_calls = calls
    return decoder.register_forward_pre_hook(calls.begin, with_kwargs=True)


def compress(blocks: Sequence[Block], spec: Spec) -> None:
    """Let the best `main` of each token's experts run, the others as vectors of ones (compressed.py)."""
    for block in blocks:
        bank: Any = block.experts
        inner = block.bank.peek(0)["up"].shape[0]
        bank.__class__ = compressed_class(cast(Any, type(bank)))
        given = spec.bank_options
        bank.add_compressed(block.width, inner, given["main"], given["vectors"], bool(given["renormalise_main"]))


def _stock(own: type) -> type:
    """The architecture's class behind what may have been put in front of it for speed."""
    return next(base for base in own.__mro__ if base.__module__.startswith("transformers."))


def _finished(module: nn.Module) -> None:
    """Tell transformers that these weights are drawn: it would start them anew by its own rules."""
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def hosted_routers(model: nn.Module) -> list[HostedRouter]:
    return [module for module in model.modules() if isinstance(module, HostedRouter)]


def install_spec(model: Any, spec: Spec) -> None:
    """`install` on a model that was just built from a configuration."""
    by_layer = {block.layer: block for block in View(model)}
    missing = [layer for layer in spec.layers if layer not in by_layer]
    if missing:
        raise BadInput(f"retrofit.layers: no MoE block in layer {missing[0]}; those are {sorted(by_layer)}")
    install(model, [by_layer[layer] for layer in spec.layers], spec)
