"""Hydra's block: an SSM path, window attention, chunk-routed experts and two memories, switched on in stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.recompute import recomputing
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.attention import SelfAttention
from moesaic.layers.layer import Layer
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.layers.state_space import GatedConvolution, StateSpace

STAGES = ("ssm", "attention", "moe", "memory")


class Workspace(nn.Module):
    """Slots that a model writes batch summaries to in training and every token reads.

    Read: a token's query is the mean of its sequence up to itself (the released mean over the whole sequence sees later
    tokens); the softmax runs over its `active` best slots. Write: after the optimiser step, so that a recomputed
    forward reads what the first one read, each training batch's summary (the softmax-gated mean over its sequences)
    goes into the slot of the smallest norm, 0.9 slot + 0.1 summary. Slots are state, not weights: no gradient, saved
    in checkpoints, fixed in evaluation.
    """

    def __init__(self, dim: int, slots: int = 64, active: int = 32, rank: int = 128):
        super().__init__()
        if not 1 <= active <= slots:
            raise BadInput(f"active={active}: between 1 and the {slots} slots")
        self.active = active
        self.down = nn.Linear(dim, rank, bias=False)
        self.read_gate = nn.Linear(rank, rank, bias=False)
        self.write_gate = nn.Linear(rank, 1, bias=False).requires_grad_(False)
        self.up = nn.Linear(rank, dim, bias=False)
        self.pending: list[Tensor] = []
        self.slots_MR: Tensor
        self.register_buffer("slots_MR", torch.randn(slots, rank) * 0.02)

    def forward(self, x_BND: Tensor, real_BN: Tensor, write: bool) -> Tensor:
        real_BN1 = real_BN.unsqueeze(-1)
        total = x_BND.float().masked_fill(~real_BN1, 0.0).cumsum(1)
        mean_BND = total / real_BN1.float().cumsum(1).clamp(min=1)
        summary_BNR = self.down(mean_BND.to(x_BND.dtype))
        slots_MR = self.slots_MR.float()
        scores_BNM = self.read_gate(summary_BNR).float() @ slots_MR.T
        kth = scores_BNM.topk(self.active, -1).values[..., -1:]
        read_BNR = scores_BNM.masked_fill(scores_BNM < kth, float("-inf")).softmax(-1) @ slots_MR
        if write and not recomputing():
            last_BR = summary_BNR[:, -1].detach()
            self.pending.append((self.write_gate(last_BR).softmax(0) * last_BR).sum(0))
        return self.up(read_BNR.to(x_BND.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        for summary_R in self.pending:
            slot = int(self.slots_MR.norm(dim=-1).argmin())
            self.slots_MR[slot] = 0.9 * self.slots_MR[slot] + 0.1 * summary_R
        self.pending.clear()


@register("layers", "hydra", paper="2508.15099", card="layers-and-balancing.md#hydra", needs={"sequence_ids", "positions"})
class Hydra(Layer):
    """y = LN(x + a SSM(x) + b Attention(x) + c MoE(x)) + memories, in place of the stream; a = 1, b = 0.15, c = 0.5 learned.

    The paper puts attention (causal, `window` tokens) in every 4th block and experts in every other one: `attention`
    and `moe` say which this one has. Experts are chosen per chunk by the mean of the chunk before. `workspace` and
    `memory` (product keys, `memory` values; 0 for none) add what they read after the norm. `fast` takes the gated
    convolution for the SSM. `stages` are the training steps at which attention, experts and memories switch on (needs
    "step"); the stage reached is saved and is what evaluation runs. None: all on.
    """

    needs = frozenset({"sequence_ids", "positions"})
    attends: ClassVar[bool] = True
    own_norm: ClassVar[bool] = True
    residual = False
    no_cache: ClassVar[str] = "its SSM state, chunk means and window live in the layer's own pass over a sequence"

    def __init__(
        self,
        dim: int,
        experts: int = 4,
        k: int = 2,
        width: int | None = 192,
        heads: int = 4,
        window: int = 256,
        chunk: int = 32,
        attention: bool = True,
        moe: bool = True,
        workspace: bool = True,
        memory: int = 4096,
        fast: bool = False,
        stages: Sequence[int] | None = None,
        alpha: float = 0.01,
        *,
        host: Iterable[str] | None = None,
    ):
        super().__init__()
        self.check_host(type(self), self.needs | ({"step"} if stages else set()), host)
        if stages is not None and (len(stages) != 3 or sorted(stages) != list(stages)):
            raise BadInput(f"stages={stages}: three rising steps, at which attention, experts and memories switch on")
        self.window, self.experts, self.k, self.stages = window, experts, k, stages
        self.ssm = GatedConvolution(dim) if fast else StateSpace(dim)
        self.attention = SelfAttention(dim, heads) if attention else None
        options = {"k": k, "size": chunk}
        balance = {"switch": alpha} if alpha else {}
        bank = {} if width is None else {"width": width}
        self.moe = MoE(dim, experts, "chunk", balance=balance, router_options=options, bank_options=bank) if moe else None
        self.workspace = Workspace(dim) if workspace else None
        self.memory = MoE(dim, memory, "product_key") if memory else None
        self.mix_3 = nn.Parameter(torch.tensor([1.0, 0.15, 0.5]))
        self.norm = nn.LayerNorm(dim)
        self.stage: Tensor
        self.register_buffer("stage", torch.tensor(0 if stages else len(STAGES) - 1))

    def active(self, ctx: RoutingContext) -> int:
        """The stage that runs now, 0 to 3; a training step moves it."""
        if self.stages is not None and ctx.training:
            self.stage.fill_(sum(ctx.need("step", "hydra") >= s for s in self.stages))
        return int(self.stage)

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD, at = x.reshape(-1, x.shape[-1]), Sequences(x, ctx)
        stage, x_BND = self.active(ctx), at.pad(x_TD)
        a, b, c = self.mix_3.to(x.dtype)
        y_BND = x_BND + a * self.ssm(x_BND, at.real_BN)
        if self.attention is not None and stage >= 1:
            y_BND = y_BND + b * self.attention(x_BND, at.allowed(True, self.window))
        y_TD, routing = at.flat(y_BND), self._unrouted(x_TD)
        if self.moe is not None and stage >= 2:
            moe_TD, routing = self.moe(x_TD, ctx)
            y_TD = y_TD + c * moe_TD
        y_TD = self.norm(y_TD)
        if stage >= 3 and self.workspace is not None:
            y_TD = y_TD + at.flat(self.workspace(at.pad(y_TD), at.real_BN, ctx.training))
        if stage >= 3 and self.memory is not None:
            y_TD = y_TD + self.memory(y_TD, ctx)[0]
        return y_TD.reshape(x.shape), routing.replace(carry=ctx.carry)

    def _unrouted(self, x_TD: Tensor) -> Routing:
        """The routing of a block that runs no expert: empty slots."""
        logits_TE = torch.zeros(len(x_TD), self.experts, device=x_TD.device)
        empty_TK = torch.full((len(x_TD), self.k), -1, device=x_TD.device)
        return Routing(logits_TE, experts_TK=empty_TK, weights_TK=torch.zeros(empty_TK.shape, device=x_TD.device))

    def after_step(self) -> None:
        for part in (self.moe, self.memory, self.workspace):
            if part is not None:
                part.after_step()
