"""Dense2MoE's stages on text: a MoE cut from a dense model learns from it, first its shared experts, then the routed ones.

Shape legend: B batch, N tokens, D width, L layers, T tokens of a block, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.surgery.objective import Batch, Given, Objective, Stage, decoder_layers, token_logits
from moesaic.surgery.recovery import softened_kl
from moesaic.view.block import Block, View


def feature_weights(output: Tensor, features: Sequence[Tensor], norms: Sequence[Tensor]) -> list[Tensor]:
    """w_l = |L_distill| / |L_feature^l| * (sum_l ||f_tea^l||) / (L ||f_tea^l||), detached; 0 where a feature agrees."""
    mean = torch.stack([norm.detach() for norm in norms]).mean()
    found = []
    for feature, norm in zip(features, norms, strict=True):
        size = feature.detach().abs()
        tiny = torch.finfo(torch.float32).tiny
        weight = output.detach().abs() / size.clamp(min=tiny) * mean / norm.detach().clamp(min=tiny)
        found.append(torch.where(size > 0, weight, torch.zeros_like(weight)))
    return found


def load_loss(routing: Routing, experts: int) -> Tensor:
    """E sum_e f_e P_e of one block, P the softmax where the router shows no probabilities: 1 where the load is even."""
    assert routing.experts_TK is not None and routing.logits_TE is not None
    chosen_TK = routing.experts_TK[routing.experts_TK >= 0]
    share_E = torch.bincount(chosen_TK.flatten(), minlength=experts)[:experts].float() / max(1, chosen_TK.numel())
    probs_TE = routing.logits_TE.float().softmax(-1) if routing.probs_TE is None else routing.probs_TE.float()
    return experts * (share_E * (probs_TE / probs_TE.sum(-1, keepdim=True)).mean(0)).sum()


class Features(Objective):
    """KL to the dense teacher, with feature losses of the layers at the end of every group of `group` (0: the output alone).

    `part`: "shared" (they learn, routed ones are off) or "routed" (experts and routers learn, shared ones do not).
    """

    def __init__(self, part: str, group: int, aux: float) -> None:
        self.part, self.group, self.aux = part, group, aux

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.teacher, self.blocks = given.teacher, list(View(model))
        for block in self.blocks:
            if block.shared is None:
                raise BadInput(f"{block.name} has no shared expert: upcycle dense2moe makes students that have")
        self.layers, self.taught = decoder_layers(model), decoder_layers(self.teacher)
        if len(self.layers) != len(self.taught):
            raise BadInput(f"the student has {len(self.layers)} layers, its teacher {len(self.taught)}: features are by layer")
        last = len(self.layers) - 1
        self.ends = [i for i in self.layers if (i + 1) % self.group == 0 or i == last] if self.group else []
        if self.part == "shared":
            for block in self.blocks:
                block.experts.forward = _nothing  # what would run is not computed
            return [p for block in self.blocks if block.shared is not None for p in block.shared.parameters()]
        owners = [owner for block in self.blocks for owner in (block.experts, block.router) if owner is not None]
        return list({id(p): p for owner in owners for p in owner.parameters()}.values())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        ids_BN, loads = batch["text"], list[Tensor]()

        def weigh(routing: Routing, block: Block) -> None:
            loads.append(load_loss(routing, block.num_experts))

        with torch.no_grad():
            teacher_BNV, wanted = _seen(self.teacher, self.taught, self.ends, ids_BN)
        handle = View(model).on_route(weigh) if self.aux and self.part == "routed" else None
        try:
            student_BNV, got = _seen(model, self.layers, self.ends, ids_BN)
        finally:
            if handle is not None:
                handle.remove()
        output = softened_kl(student_BNV, teacher_BNV, 1.0)
        features = [(g.float() - w.float()).square().mean() for g, w in zip(got, wanted, strict=True)]
        norms = [w.float().norm() for w in wanted]
        total = output
        if features:
            for weight, feature in zip(feature_weights(output, features, norms), features, strict=True):
                total = total + weight * feature
        return total + self.aux * torch.stack(loads).mean() if loads else total

    def finish(self, model: Any) -> Any:
        for block in self.blocks:
            block.experts.__dict__.pop("forward", None)
        return model


def _nothing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like(hidden_states)


def _seen(model: Any, layers: dict[int, nn.Module], ends: list[int], ids_BN: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and what these layers give [B, N, D]."""
    found: dict[int, Tensor] = {}
    handles = []
    for i in ends:

        def keep(module: nn.Module, args: Any, output: Any, i: int = i) -> None:
            found[i] = output[0] if isinstance(output, tuple) else output

        handles.append(layers[i].register_forward_hook(keep))
    try:
        logits_BNV = token_logits(model, ids_BN)
    finally:
        for handle in handles:
            handle.remove()
    return logits_BNV, [found[i] for i in ends]


@register("distill", "dense2moe", paper="2510.09094", card="surgery-and-steering.md#dense2moe", exact=False)
class Dense2MoEStages(Objective):
    """Stages behind `upcycle dense2moe`, the dense model as teacher: shared experts learn with the routed ones off; shared ones
    stand still, routed experts and routers learn with a feature loss per layer, then per group of layers, then on the output.

    The paper distils a diffusion model's noise; here the output's loss is KL of next tokens. Features are mean squared
    differences of what layers give, by `feature_weights`; the load loss is `aux`. Mixture of Blocks is not built: its router
    reads a conditioning vector. Shares of the steps are ours, the paper gives none for text.

    Args:
        group: layers in a group of the third stage.
        shared, layers: shares of the steps for the first two stages; the last two halve the rest.
    """

    def __init__(self, group: int = 2, aux: float = 0.01, shared: float = 0.4, layers: float = 0.3) -> None:
        if group < 1 or aux < 0 or min(shared, layers) < 0 or shared + layers > 1:
            raise BadInput(f"group={group}, aux={aux}, shared={shared}, layers={layers}: 1 or more, and shares of the steps")
        self.group, self.aux, self.shares = group, aux, (shared, layers)

    def plan(self, model: Any) -> dict[str, Any]:
        return {"stock": True, "reason": "the architecture stays", "trains": "shared experts, then routed ones and routers"}

    def stages(self) -> list[Stage]:
        shared, layers = self.shares
        rest = max(0.0, 1 - shared - layers) / 2
        return [
            Stage("shared experts", Features("shared", 1, self.aux), shared),
            Stage("features per layer", Features("routed", 1, self.aux), layers),
            Stage("features per group", Features("routed", self.group, self.aux), rest),
            Stage("output", Features("routed", 0, self.aux), rest),
        ]
