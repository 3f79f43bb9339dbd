"""`moesaic bench routing`: what each registered router costs over plain top-k, forward and backward, and of a whole layer.

Every router gets the same tokens, in sequences, and everything it may need (attention, ids, the state of a layer before);
a round runs every router once. A router that reads its experts' activations is charged with them. The layer is top-k over
a `gated_mlp` bank in bf16, in the same rounds. Shape legend: as in core/routing.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moesaic.bench import machine
from moesaic.bench.runner import interleave, summary
from moesaic.core import registry
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput, MoesaicError
from moesaic.core.routing import Routing
from moesaic.layers.moe import MoE
from moesaic.models.language.attention import Look, MixByAttention, Mixes
from moesaic.routing.router import Router

BASE = "topk"
HEADS = 8
VOCABULARY = 8192


@dataclass
class Options:
    tokens: int = 4096
    length: int = 512
    width: int = 1024
    inner: int = 512
    experts: int = 64
    slots: int = 8
    routers: tuple[str, ...] = ()
    """Names; none for all."""
    mode: str = "train"
    device: str = "cpu"
    rounds: int = 20
    seconds: float = 120.0
    layer: bool = True

    def check(self) -> None:
        if self.mode not in ("train", "eval"):
            raise BadInput(f"--mode {self.mode!r}: train (forward and backward) or eval (forward)")
        if min(self.tokens, self.length, self.width, self.inner, self.experts, self.slots, self.rounds) < 1:
            raise BadInput("sizes and rounds are at least 1")
        if self.tokens % self.length:
            raise BadInput(f"--tokens {self.tokens} is no multiple of --length {self.length}, the tokens of a sequence")
        if self.slots > self.experts or self.width % HEADS:
            raise BadInput(f"-K {self.slots} experts of -E {self.experts}; -D {self.width} must divide by {HEADS} heads")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise BadInput("--device cuda: no CUDA device on this machine")
        for name in self.routers:
            registry.get("routing", name)


def run(options: Options, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """{machine, profile, options, rows}: a row per router, with an error where it cannot be built so, and one of the layer."""
    options.check()
    header = machine.describe(options.device)
    progress("measuring the machine")
    profile = machine.load_or_measure(options.device)
    torch.manual_seed(0)
    x_TD = torch.randn(options.tokens, options.width, device=options.device, dtype=torch.bfloat16)
    ctx = context(options)
    names = options.routers or tuple(entry.name for entry in registry.entries("routing"))
    contestants: dict[str, Callable[[int], Any]] = {}
    routers: dict[str, Router] = {}
    failed: list[dict[str, Any]] = []
    for name in dict.fromkeys((BASE, *names)):
        progress(f"building {name}")
        try:
            router, own = build(name, options, ctx, x_TD)
            contestants[name] = partial(step, router, own, x_TD, options.mode == "train")
            contestants[name](0)
            routers[name] = router
        except MoesaicError as error:
            contestants.pop(name, None)
            failed.append({"impl": name, **_case(options), "seconds": None, "error": str(error)})
    if options.layer:
        contestants["layer"] = _layer(options, x_TD, ctx)
    progress(f"{len(contestants)} contestants in turn")
    seconds = interleave(contestants, options.rounds, options.seconds, options.device)
    layer = summary(seconds["layer"])["seconds"] if options.layer else None
    rows = []
    for name, router in routers.items():
        over = [mine - base for mine, base in zip(seconds[name], seconds[BASE], strict=True)]
        overhead = sorted(over)[len(over) // 2]
        flops = router.flops_per_token(options.length) * options.tokens + router.fixed_flops
        flops *= 3 if options.mode == "train" else 1
        rows.append(
            {
                "impl": name,
                **_case(options),
                **summary(seconds[name]),
                "overhead_seconds": overhead,
                "share_of_layer": None if layer is None else overhead / layer,
                "flops_per_token": router.flops_per_token(options.length),
                "floor_seconds": flops / profile["float32_flops"],
                "parameters": router.parameter_count,
                "error": None,
            }
        )
    if layer is not None:
        rows.append({"impl": "layer", **_case(options), **summary(seconds["layer"]), "floor_seconds": None, "error": None})
    return {"machine": header, "profile": profile, "options": asdict(options), "rows": [*rows, *failed]}


def _case(options: Options) -> dict[str, Any]:
    return {"T": options.tokens, "D": options.width, "E": options.experts, "K": options.slots, "mode": options.mode}


def context(options: Options) -> RoutingContext:
    """Everything that a router may need, for sequences of `length` tokens."""
    T, N, device = options.tokens, options.length, options.device
    B, C = T // N, options.width // HEADS
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(B, HEADS, N, C, generator=draw).to(device, torch.bfloat16) for _ in range(2))
    token_T = torch.arange(T, device=device)
    return RoutingContext(
        mode="train" if options.mode == "train" else "eval",
        threads_state=True,
        carry={},
        attention=MixByAttention(q, k, Look(None, True), Mixes(None, 1)),
        token_ids=torch.randint(VOCABULARY, (T,), generator=draw).to(device),
        positions=token_T % N,
        sequence_ids=token_T // N,
        mask=torch.ones(T, dtype=torch.bool, device=device),
        task_ids=token_T // N % 2,
        modality_ids=token_T % N // (N // 2 or 1) % 2,
        language_ids=token_T // N % 4 - 1,
        class_ids=token_T // N % 7,
        timesteps=token_T // N,
        layer=1,
        step=3,
        generator=torch.Generator(device).manual_seed(2),
    )


def build(name: str, options: Options, ctx: RoutingContext, x_TD: Tensor) -> tuple[Router, RoutingContext]:
    """A router of the options' sizes and the context of its calls, in which a layer before it has left its state."""
    entry, kind = registry.get("routing", name), registry.get("routing", name).build
    wanted = {"k": options.slots, "average": float(options.slots), "vocab_size": VOCABULARY}
    if name == "moge":
        wanted["groups"] = options.slots
    given = {key: value for key, value in wanted.items() if key in entry.parameters}
    shared: dict[str, Any] = kind.shared(options.width)  # type: ignore[attr-defined]
    device = options.device
    router: Router = kind(options.width, options.experts, **given, **shared)
    router.to(device).train(options.mode == "train")
    if "activations" in router.needs:
        bank = registry.get("experts", kind.bank).build(options.width, options.experts).to(device, x_TD.dtype)  # type: ignore[attr-defined]
        ctx = ctx.replace(activations=lambda x: bank.activations(x, {}))
    if "previous" in router.needs:
        with torch.no_grad():
            state = router(x_TD, ctx.replace(layer=0)).state
        ctx = ctx.replace(previous=state.detach() if isinstance(state, Tensor) else state)
    return router, ctx


def step(router: Router, ctx: RoutingContext, x_TD: Tensor, train: bool, number: int = 0) -> None:
    """Route once, and in training carry a gradient back from the weights to the tokens and the router."""
    if not train:
        with torch.inference_mode():
            router(x_TD, ctx.replace(memo={}))
        return
    x_TD = x_TD.detach().requires_grad_()
    weights = weights_of(router(x_TD, ctx.replace(memo={})))
    if weights.requires_grad:
        wanted = [x_TD, *(p for p in router.parameters() if p.requires_grad)]
        torch.autograd.grad(weights.float().square().sum(), wanted, allow_unused=True)


def weights_of(routing: Routing) -> Tensor:
    """What mixes the experts' outputs, in whichever form the routing has."""
    for found in (routing.weights_TK, routing.merge_GE, routing.keyed_T2HN):
        if found is not None:
            return found
    assert routing.pairs is not None
    return routing.pairs.weight_S


def _layer(options: Options, x_TD: Tensor, ctx: RoutingContext) -> Callable[[int], None]:
    layer = MoE(
        options.width, options.experts, BASE, router_options={"k": options.slots}, bank_options={"width": options.inner}
    ).to(options.device, torch.bfloat16)
    layer.train(options.mode == "train")
    gc.collect()

    def once(number: int) -> None:
        if options.mode == "eval":
            with torch.inference_mode():
                layer(x_TD, ctx)
            return
        own_TD = x_TD.detach().requires_grad_()
        y_TD = layer(own_TD, ctx)[0]
        torch.autograd.grad(y_TD, [own_TD, *layer.parameters()], torch.ones_like(y_TD), allow_unused=True)

    return once
