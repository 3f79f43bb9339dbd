"""Read-ME: neurons that work on a domain become its expert; a small router over token ids picks one for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.conversion import Told
from moesaic.surgery.dense import Dense
from moesaic.surgery.living import Living, build
from moesaic.surgery.passes import activations, ffns, opened, rows

QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Levels at which a token's activations are thresholded softly for the router's target."""

DECAY = 0.8
"""Of the rates, per round."""

BATCH = 4


@register("upcycle", "read_me", paper="2410.19123", card="surgery-and-steering.md#read-me", exact=False)
class ReadMe(Living):
    """One expert per domain of the text (lines of {text, domain}): per layer the I * `rate` neurons of largest mean |h|.

    Neurons that all domains keep form an always-on expert, the rest of each domain's mask is its own. The router (embedding
    from the model's, `blocks` causal blocks, linear) reads token ids alone, so all layers' experts are known beforehand.
    It is trained for `router_steps` against the match of a token's activations with the masks (thresholded softly at five
    quantiles, centred, times 10: 0.75 CE to the best with smoothing 0.5, 0.25 soft CE, summed over layers), then the
    experts for `expert_steps` in the language model's loss, `rounds` times, rates times 0.8 each. How soft the threshold is,
    the source's summary does not say: here a sigmoid on the scale of the token's mean |h|. Ranking by mean |h| without
    down_proj's norm is what the released code does.
    """

    def __init__(
        self, rate: float = 0.5, blocks: int = 1, heads: int = 4, rounds: int = 5, router_steps: int = 100,
        expert_steps: int = 200, router_lr: float = 1e-3, lr: float = 1e-4, domains: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 < rate <= 1:
            raise BadInput(f"rate={rate}: the share of neurons that a domain keeps, above 0 and at most 1")
        if min(blocks, heads, domains) < 1 or min(rounds, router_steps, expert_steps) < 0:
            raise BadInput(f"blocks={blocks}, heads={heads}, domains={domains}, rounds={rounds}: too few")
        self.rate, self.blocks, self.heads, self.rounds, self.domains = rate, blocks, heads, rounds, domains
        self.router_steps, self.expert_steps, self.router_lr, self.lr, self.seed = (
            router_steps,
            expert_steps,
            router_lr,
            lr,
            seed,
        )

    def needs(self) -> int:
        return self.domains

    def spec(self, models: Sequence[Dense]) -> dict[str, Any]:
        config = models[0].config
        if config.hidden_act not in ("silu", "swish") or getattr(config, "mlp_bias", False):
            raise BadInput(f"read_me: its experts are SiLU-gated and without biases; {config.model_type} here is not")
        if config.hidden_size % self.heads or config.hidden_size // self.heads % 2:
            raise BadInput(f"heads={self.heads}: a width of {config.hidden_size} is not cut into heads of even width")
        models[0].ffn(0)
        return {"method": "read_me", "blocks": self.blocks, "heads": self.heads}

    def grows(self, models: Sequence[Dense]) -> int:
        table = models[0].table["model.embed_tokens.weight"]
        return models[0].table.nbytes + table.nbytes + self.blocks * 8 * table.shape[1] ** 2 * table.dtype.itemsize

    def make(self, models: Sequence[Dense], told: Told) -> Any:
        torch.manual_seed(self.seed)
        dense, tokenizer = opened(models[0].folder, told.trust_remote_code)
        names = sorted(told.texts)
        batches = {name: rows(tokenizer, told.texts[name], told.seq_len, told.max_tokens) for name in names}
        mean_ELI = torch.stack([activations(dense, batches[name]) for name in names])
        masks_ELI = domain_masks(mean_ELI, self.rate)
        shared_LI = masks_ELI.all(0)
        own_ELI = masks_ELI & ~shared_LI
        spec = self.spec(models) | {
            "experts": len(names), "domains": names, "shared": shared_LI.sum(1).tolist(),
            "inner": own_ELI.sum(2).amax(0).tolist(),
        }  # fmt: skip
        made = build(models, spec)
        fill(made, dense, shared_LI, own_ELI)
        everything = [row for name in names for row in batches[name]]
        for turn in range(self.rounds):
            decay = DECAY**turn
            train_router(
                made.token_router, dense, masks_ELI, everything, self.router_steps, self.router_lr * decay, self.seed + turn
            )
            self._train_experts(made, tokenizer, told, self.lr * decay, turn)
        return made

    def _train_experts(self, made: Any, tokenizer: Any, told: Told, lr: float, turn: int) -> None:
        if not self.expert_steps:
            return
        if told.train is None:
            raise BadInput("read_me: expert_steps needs a training loop, and none was given")
        documents = [document for name in sorted(told.texts) for document in told.texts[name]]
        parameters = [p for layer in made.get_decoder().layers for p in layer.mlp.parameters()]
        told.train(
            made, tokenizer, {"text": documents}, parameters, steps=self.expert_steps, lr=lr, batch_size=BATCH,
            seq_len=told.seq_len, seed=self.seed + turn,
        )  # fmt: skip


def domain_masks(mean_ELI: Tensor, rate: float) -> Tensor:
    """Per domain and layer the floor(I * rate) largest, bool [E, L, I]; those that tie with the next one drop out."""
    inner = mean_ELI.shape[-1]
    keep = int(inner * rate)
    if keep == inner:
        return torch.ones_like(mean_ELI, dtype=torch.bool)
    next_EL1 = mean_ELI.sort(-1, descending=True).values[..., keep : keep + 1]
    return mean_ELI > next_EL1


@torch.no_grad()
def fill(made: Any, dense: Any, shared_LI: Tensor, own_ELI: Tensor) -> None:
    """Neurons by masks into the new FFNs, and everything else as it is in the dense model."""
    held = dense.state_dict()
    for name, tensor in made.state_dict().items():
        if name in held:
            tensor.copy_(held[name])
    made.token_router.embed.weight.copy_(dense.get_input_embeddings().weight)
    for at, (layer, mlp) in enumerate(zip(made.get_decoder().layers, ffns(dense), strict=True)):
        gate, up, down = (getattr(mlp, f"{part}_proj").weight for part in ("gate", "up", "down"))
        kept = torch.nonzero(shared_LI[at]).flatten()
        layer.mlp.shared_gate_up.copy_(torch.cat([gate[kept], up[kept]]))
        layer.mlp.shared_down.copy_(down[:, kept])
        layer.mlp.gate_up.zero_()
        layer.mlp.down.zero_()
        inner = layer.mlp.down.shape[2]
        for e, mask_LI in enumerate(own_ELI):
            mine = torch.nonzero(mask_LI[at]).flatten()
            layer.mlp.gate_up[e, : len(mine)] = gate[mine]
            layer.mlp.gate_up[e, inner : inner + len(mine)] = up[mine]
            layer.mlp.down[e, :, : len(mine)] = down[:, mine]


@torch.no_grad()
def matches(dense: Any, masks_ELI: Tensor, ids_BN: Tensor) -> Tensor:
    """How well each token's activations match each domain's mask, per layer, centred and times 10: [L, B, N, E]."""
    seen: list[Tensor] = []
    handles = [
        mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].float().abs())) for mlp in ffns(dense)
    ]
    try:
        dense(input_ids=ids_BN, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for at, h_BNI in enumerate(seen):
        mask_EI = masks_ELI[:, at].float()
        mask_EI = mask_EI / mask_EI.sum(1, keepdim=True).clamp(min=1)
        scale_BN1 = h_BNI.mean(-1, keepdim=True).clamp(min=1e-12)
        levels_QBN = torch.quantile(h_BNI, torch.tensor(QUANTILES), dim=-1)
        soft_BNI = torch.stack([torch.sigmoid((h_BNI - level[..., None]) / scale_BN1) for level in levels_QBN]).mean(0)
        score_BNE = soft_BNI @ mask_EI.T
        found.append(10 * (score_BNE - score_BNE.mean(-1, keepdim=True)))
    return torch.stack(found)


def router_loss(logits_BNE: Tensor, scores_LBNE: Tensor) -> Tensor:
    """0.75 CE to the best match, smoothed by 0.5, and 0.25 CE to the softmax of the matches, summed over layers."""
    logits_TE = logits_BNE.flatten(0, 1)
    total = logits_TE.new_zeros(())
    for score_BNE in scores_LBNE:
        score_TE = score_BNE.flatten(0, 1)
        total = total + 0.75 * cross_entropy(logits_TE, score_TE.argmax(-1), label_smoothing=0.5)
        total = total + 0.25 * cross_entropy(logits_TE, score_TE.softmax(-1))
    return total


def train_router(
    router: Any, dense: Any, masks_ELI: Tensor, batches: Sequence[Tensor], steps: int, lr: float, seed: int
) -> list[float]:
    """Adam on the router alone; rows are drawn by `seed`. The loss of every step."""
    optimizer, losses = torch.optim.Adam(router.parameters(), lr), []
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids_BN = batches[int(torch.randint(len(batches), (), generator=random))]
        with torch.enable_grad():
            loss = router_loss(router(ids_BN), matches(dense, masks_ELI, ids_BN))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
