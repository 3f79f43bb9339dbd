"""Rewiring experts on the fly: small vectors on router logits, fitted to the text so far while it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.steering.steer import Steer
from moesaic.view import Policy, View
from moesaic.view.course import Course, Steps
from moesaic.view.policy import resolve
from moesaic.view.slots import token_major

MOST_STEPS = 100
"""A request must not keep a server in gradient steps."""


@register(
    "steering", "rewiring", paper="2510.14853", exact=False,
    card="surgery-and-steering.md#rewiring-experts-on-the-fly-online-router-logit-vectors",
)  # fmt: skip
class Rewiring(Steer):
    """One vector per MoE layer, shared by all tokens, added to the router's logits; zero for every new answer. First on the
    prompt, then after every `every` new tokens, `steps` gradient steps of rate `lr` on the next-token cross-entropy of prompt
    and text so far move the vectors of some layers; weights stay as they are.

    Layers are ranked by C = -(1/k) sum over the selected experts of log p, averaged over the context: the most decisive
    `share` of them (smallest C) learns (`layers` "decisive"), the least decisive ("undecided"), "all", or all with the
    gradient times softmax(-C) over layers ("soft"). The text calls C confidence though it grows as routing gets less
    decisive: both signs are here (sign, share, averaging and the soft form are the card's inference; no code was released).
    After an update the text is read again, since cached keys and values are those of the old vectors. Softmax routers do
    not see a shift of all logits; sigmoid routers do.
    """

    alone = "rewiring takes gradient steps and reads the text again: its answers share no call"

    def __init__(
        self,
        steps: int = 5,
        lr: float = 0.05,
        every: int = 128,
        share: float = 0.5,
        layers: Literal["decisive", "undecided", "all", "soft"] = "decisive",
        window: int = 2048,
    ) -> None:
        if not 0 <= steps <= MOST_STEPS or every < 1 or not 0 <= lr < float("inf") or not 0 < share <= 1 or window < 2:
            raise BadInput(f"rewiring: steps {steps}, every {every}, lr {lr}, share {share}, window {window}: out of range")
        if layers not in ("decisive", "undecided", "all", "soft"):
            raise BadInput(f"rewiring: layers {layers!r}: decisive, undecided, all or soft")
        self.count, self.lr, self.every, self.share, self.layers, self.window = steps, lr, every, share, layers, window

    def check(self) -> None:
        resolve(Policy(logits={block.name: torch.zeros(block.num_experts) for block in self.experts()}), self.experts())

    def steps(self, prompt_ids: Sequence[int]) -> Steps[Course]:
        return self.course(list(prompt_ids), {block.name: torch.zeros(block.num_experts) for block in self.experts()})

    def course(self, ids: list[int], deltas: Mapping[str, Tensor]) -> Steps[Course]:
        """The course from here on, with vectors fitted to the text so far."""
        text = ids[-self.window :]
        losses: list[float] = []
        if len(text) > 1:  # a text of one token has nothing to predict
            deltas, losses = yield from descent(
                self.model, self.experts(), text, deltas, self.count, self.lr, self.layers, self.share
            )
        return Course(
            policy=Policy(logits=dict(deltas)),
            tokens=self.every,
            then=lambda longer: self.course(list(longer), deltas),
            notes={"rewiring_losses": losses},
        )


Fitted = tuple[dict[str, Tensor], list[float]]


def descent(
    model: Any, blocks: View, ids: Sequence[int], deltas: Mapping[str, Tensor], count: int, lr: float, layers: str, share: float
) -> Steps[Fitted]:
    """`count` steps of gradient descent on the vectors of the chosen layers; and the loss before each. Raises BadInput where
    no gradient reaches a vector: experts that have no backward pass."""
    losses: list[float] = []
    if not count:
        return dict(deltas), losses
    with torch.inference_mode(False):
        deltas = {name: value.detach().clone() for name, value in deltas.items()}
        scale = weights_of_layers(decisiveness(model, blocks, ids, deltas), layers, share)
    moving = [name for name in deltas if scale[name] > 0]
    for _ in range(count):
        yield
        with torch.inference_mode(False), torch.enable_grad():
            learn = {name: value.requires_grad_(name in moving) for name, value in deltas.items()}
            loss = context_loss(model, blocks, ids, learn)
            losses.append(float(loss.detach()))
            if not loss.requires_grad:
                raise BadInput("rewiring: these experts have no backward pass (weights of few bits): run them unquantised")
            slopes = torch.autograd.grad(loss, [learn[name] for name in moving], allow_unused=True)
            deltas = {name: value.detach() for name, value in learn.items()}
            for name, slope in zip(moving, slopes, strict=True):
                if slope is not None:
                    deltas[name] = deltas[name] - lr * scale[name] * slope
    return dict(deltas), losses


def context_loss(model: Any, blocks: View, ids: Sequence[int], deltas: Mapping[str, Tensor]) -> Tensor:
    """Mean next-token cross-entropy of the ids, in nats, under the vectors."""
    given = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    with blocks.policy(logits=dict(deltas)):
        logits_ND = model(input_ids=given, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits_ND.float(), given[0, 1:])


@torch.no_grad()
def decisiveness(model: Any, blocks: View, ids: Sequence[int], deltas: Mapping[str, Tensor]) -> dict[str, float]:
    """Block name -> C, the mean over tokens of -(1/k) sum over the selected experts of log p: small where routing is sure."""
    found: dict[str, float] = {}

    def look(routing: Routing, block: Any) -> None:
        ids_TK, _ = token_major(routing)
        chosen_TK = routing.logits_TE.float().log_softmax(-1).gather(1, ids_TK.clamp(min=0))
        found[block.name] = -float(chosen_TK[ids_TK >= 0].mean())

    given = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    with blocks.policy(logits=dict(deltas)), blocks.on_route(look):
        model(input_ids=given, use_cache=False)
    return found


def weights_of_layers(decisive: Mapping[str, float], layers: str, share: float) -> dict[str, float]:
    """Block name -> factor of its gradient: 1 or 0 by hard choice, softmax(-C) times the number of layers for "soft"."""
    if layers == "all":
        return dict.fromkeys(decisive, 1.0)
    if layers == "soft":
        weights = torch.softmax(-torch.tensor(list(decisive.values())), 0) * len(decisive)
        return dict(zip(decisive, weights.tolist(), strict=True))
    order = sorted(decisive, key=lambda name: decisive[name], reverse=layers == "undecided")
    chosen = set(order[: max(1, round(share * len(order)))])
    return {name: float(name in chosen) for name in decisive}
