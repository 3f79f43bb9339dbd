"""Dr.LLM: blocks that are skipped, run or repeated per sequence, taught by a tree search over layer paths."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, rms_norm

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.layer import Layer
from moesaic.layers.moe import MoE
from moesaic.layers.sequences import Sequences
from moesaic.routing.router import empty_padding

Path = tuple[int, ...]


def path_of(counts: Sequence[int]) -> Path:
    """Layer indices of how often each layer runs: counts 1, 0, 2 are the path 0, 2, 2."""
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


def run_path(layers: Sequence[Callable[[Any], Any]], state: Any, path: Iterable[int]) -> Any:
    """The layers of a path, one after the other. All counts 1 is the model itself, bit for bit."""
    for layer in path:
        state = layers[layer](state)
    return state


def class_weights(counts: Sequence[int], beta: float = 0.999) -> Tensor:
    """(1 - beta) / (1 - beta^n) for classes of n examples, normalised to sum to their number. No example: weight 0."""
    raw = torch.tensor([(1 - beta) / (1 - beta**n) if n else 0.0 for n in counts])
    return raw * len(counts) / raw.sum()


def focal_loss(logits: Tensor, labels: Tensor, gamma: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """Mean of weight * (1 - p)^gamma * -ln p over rows; gamma 0 and equal weights are cross-entropy."""
    nats = cross_entropy(logits.float(), labels, reduction="none")
    loss = (1 - (-nats).exp()).pow(gamma) * nats
    return (loss if weights is None else loss * weights[labels]).mean()


class DepthRouter(nn.Module):
    """Linear(D, hidden), tanh-GELU, Linear(hidden, 3) of window means: logits of running a layer 0, 1 or 2 times, [B, 3].

    Each sequence's real (prompt) tokens are cut into min(windows, S) equal windows, the remainder dropped; logits are
    averaged over the windows. Xavier start, zero bias.
    """

    def __init__(self, dim: int, hidden: int = 128, windows: int = 8):
        super().__init__()
        self.windows = windows
        self.first, self.last = nn.Linear(dim, hidden), nn.Linear(hidden, 3)
        for part in (self.first, self.last):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, x_BND: Tensor, real_BN: Tensor) -> Tensor:
        rows = []
        for x_ND, real_N in zip(x_BND, real_BN, strict=True):
            prompt_SD = x_ND[real_N]
            windows = min(self.windows, len(prompt_SD))
            if not windows:
                rows.append(x_ND.new_zeros(3))
                continue
            size = len(prompt_SD) // windows
            mean_WD = prompt_SD[: windows * size].view(windows, size, -1).mean(1)
            rows.append(self.last(gelu(self.first(mean_WD), approximate="tanh")).mean(0))
        return torch.stack(rows).float() if rows else x_BND.new_zeros(0, 3).float()


def search_path(
    layers: int,
    reward: Callable[[Path], float],
    simulations: int = 50,
    seed: int = 0,
    explore: float = 1.8,
    length_cost: float = 3.0,
    random_child: float = 0.1,
) -> tuple[Path | None, float, int]:
    """Tree search from 0 .. L-1: skip 1 or 2 layers, repeat one once, at most 2 L long. (path, reward, evaluations).

    A child's score is mean reward + explore sqrt(ln N / n) - length_cost * length / L; with probability `random_child`
    any child; a node opens after its first visit. It stops when the reward beats the unmodified model's, or a path at
    least two layers shorter is as good. The answer is the best found: highest reward, then shortest, then fewest
    distinct layers; None when all rewards are 0. Rewards are cached by path.
    """
    if layers < 1 or simulations < 1:
        raise BadInput(f"layers={layers}, simulations={simulations}: nothing to search")
    draw, root = random.Random(seed), tuple(range(layers))
    known: dict[Path, float] = {}
    visits: dict[Path, int] = {}
    total: dict[Path, float] = {}

    def value(path: Path) -> float:
        if path not in known:
            known[path] = float(reward(path))
        return known[path]

    def score(child: Path, parent: Path) -> float:
        n = visits.get(child, 0)
        if not n:
            return float("inf")
        return total[child] / n + explore * (log(visits[parent]) / n) ** 0.5 - length_cost * len(child) / layers

    base = value(root)
    for _ in range(simulations):
        line = [root]
        while visits.get(line[-1], 0) and (children := [c for c in _children(line[-1], layers) if c not in line]):
            parent = line[-1]
            line.append(
                draw.choice(children) if draw.random() < random_child else max(children, key=lambda c: score(c, parent))
            )
        got = value(line[-1])
        for path in line:
            visits[path] = visits.get(path, 0) + 1
            total[path] = total.get(path, 0.0) + got
        if got > base or (got >= base > 0 and len(line[-1]) <= layers - 2):
            break
    best = min(known, key=lambda path: (-known[path], len(path), len(set(path)), path))
    return (best, known[best], len(known)) if known[best] > 0 else (None, 0.0, len(known))


def _children(path: Path, layers: int) -> list[Path]:
    skips = [path[:i] + path[i + n :] for n in (1, 2) for i in range(len(path) - n + 1)]
    repeats = [(*path[: i + 1], path[i], *path[i + 1 :]) for i in range(len(path)) if path.count(path[i]) < 2]
    return sorted({p for p in (*skips, *repeats) if p and len(p) <= 2 * layers})


@register("layers", "drllm", paper="2510.12773", card="routing.md#dr-llm", causal=False)
class DrLLM(Layer):
    """A block h + MoE(norm h) that its DepthRouter runs 0, 1 or 2 times for every sequence, decided once from x.

    `counts` (int64 [B]) overrides the router, as the labels do in its training: logits of all sequences are in
    `routing.aux["depth_logits"]` for `focal_loss`; no language-model loss reaches the router. Rows of the routing are
    skip, run, repeat. The decision reads the sequence it is given, so that a causal host must give it the prompt alone.
    `run_path` and `search_path` work on whole models; freezing the model is the caller's.
    """

    own_norm: ClassVar[bool] = True
    causal = False
    no_cache: ClassVar[str] = "a sequence's depth is decided once, from the whole prompt"

    def __init__(
        self,
        dim: int,
        experts: int = 8,
        router: str = "topk",
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
        router_options: Mapping[str, Any] | None = None,
        bank_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if causal:
            raise BadInput("Dr.LLM decides a sequence's depth from all of its tokens: not for a causal host")
        self.block = MoE(dim, experts, router, host=host, router_options=router_options, bank_options=bank_options)
        self.depth = DepthRouter(dim)
        self.counts: Tensor | None = None
        with torch.no_grad():
            self.depth.last.bias[1] = 2.0  # an untrained router runs the block once, as the base model does

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        ctx = self.context(ctx)
        x_TD, at = x.reshape(-1, x.shape[-1]), Sequences(x, ctx)
        row_T = at.slot_T // max(at.length, 1)
        logits_B3 = self.depth(at.pad(x_TD).detach(), at.real_BN)
        counts_B = logits_B3.argmax(-1) if self.counts is None else self.counts
        if counts_B.shape != (at.rows,):
            raise BadInput(f"counts of shape {tuple(counts_B.shape)} for {at.rows} sequences")
        h_TD, passes = x_TD, []
        for turn in range(2):
            runs_T1 = (counts_B > turn)[row_T].unsqueeze(1)
            real_T = runs_T1.squeeze(1) if ctx.mask is None else runs_T1.squeeze(1) & ctx.mask
            y_TD, routing = self.block(rms_norm(h_TD, h_TD.shape[-1:]), ctx.replace(mask=real_T, memo={}))
            h_TD = torch.where(runs_T1, h_TD + y_TD, h_TD)
            passes.append(routing)
        logits_T3, chosen_T1 = logits_B3[row_T], counts_B[row_T].unsqueeze(1)
        weights_T1 = torch.ones_like(chosen_T1, dtype=torch.float32)
        routing = Routing(logits_T3, logits_T3.softmax(-1), chosen_T1, weights_T1, passes=tuple(passes), carry=ctx.carry)
        aux = {"depth_logits": logits_B3}
        return (h_TD - x_TD).reshape(x.shape), empty_padding(routing.replace(aux=aux), ctx)

    def after_step(self) -> None:
        self.block.after_step()
