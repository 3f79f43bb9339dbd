"""How good a balance loss is: short training runs of the reference model on text, cross-entropy and imbalance at their end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.core.documents import read_documents
from moesaic.core.errors import BadInput
from moesaic.models.reference import ReferenceLM
from moesaic.training.balance import max_violation

DIVERGED = -1e9
"""Fitness of a loss under which training diverged: last, but a number, so that results stay JSON."""


def read_bytes(data: str, most: int = 2_000_000) -> Tensor:
    """The documents' bytes, int64, at most `most`, as many from each domain as from the next. Raises BadInput when too few."""
    domains: dict[str, bytearray] = {}
    for document in read_documents(data):
        domains.setdefault(document.domain, bytearray()).extend(document.text.encode() + b"\n")
    share = most // max(len(domains), 1)
    text = b"".join(bytes(part[:share]) for part in domains.values())
    if len(text) < 2000:
        raise BadInput(f"{data}: {len(text)} bytes of text; a search needs at least 2000")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


@dataclass
class ShortRuns:
    """`fitness(text)`: r = -(cross-entropy over the last `tail` steps + L_imb), the mean over `seeds` (the card's fitness).

    L_imb = 1/2 sum_e |f_e - 1/E| over those steps, averaged over layers. Also the parts, and MaxVio of the worst layer.
    A model of bytes, float32; the loss counts over the global batch (`accumulate` micro-steps).
    """

    text: Tensor
    steps: int = 60
    tail: int = 15
    seeds: tuple[int, ...] = (0,)
    coefficient: float = 0.01
    dim: int = 48
    layers: int = 2
    experts: int = 16
    k: int = 2
    batch_size: int = 4
    accumulate: int = 2
    length: int = 64
    lr: float = 3e-3

    def __post_init__(self) -> None:
        if not 0 < self.tail <= self.steps or not self.seeds:
            raise BadInput(f"steps={self.steps}, tail={self.tail}, seeds={self.seeds}: 0 < tail <= steps, at least one seed")

    def __call__(self, text: str) -> dict[str, float]:
        return self.of({"expression": {"text": text, "coefficient": self.coefficient}})

    def of(self, balance: dict[str, Any]) -> dict[str, float]:
        """The same for any registered balance."""
        runs = [self._run(balance, seed) for seed in self.seeds]
        mean = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
        mean["fitness"] = -(mean["cross_entropy"] + mean["imbalance"])
        if not math.isfinite(mean["fitness"]):
            mean = dict.fromkeys(mean, -DIVERGED) | {"fitness": DIVERGED}
        return mean

    def _run(self, balance: dict[str, Any], seed: int) -> dict[str, float]:
        # Its own random stream, left as it was: the result depends on the seed and the expression alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ReferenceLM(
                256, self.dim, self.layers, 4, self.experts, width=self.dim, balance=balance,
                router_options={"k": self.k}, balance_scope="global",
            ).train()  # fmt: skip
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr)
            losses, shares = [], []
            for step in range(self.steps):
                cross_entropy, counts_LE = self._step(model, optimizer, seed, step)
                if step >= self.steps - self.tail:
                    losses.append(cross_entropy)
                    shares.append(counts_LE / counts_LE.sum(1, keepdim=True))
        share_NLE = torch.stack(shares)
        imbalance = 0.5 * (share_NLE - 1 / self.experts).abs().sum(-1).mean().item()
        worst = max(max_violation(share_E) for share_E in share_NLE.mean(0))
        starved = torch.lt(share_NLE.mean(0), 0.064 / self.experts).float().mean().item()
        cross_entropy = sum(losses) / len(losses)
        return {"cross_entropy": cross_entropy, "imbalance": imbalance, "max_vio": worst, "starved": starved}

    def _step(self, model: ReferenceLM, optimizer: torch.optim.Optimizer, seed: int, step: int) -> tuple[float, Tensor]:
        total, counts_LE = 0.0, torch.zeros(self.layers, self.experts)
        for micro in range(self.accumulate):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 64 + micro)
            starts = torch.randint(len(self.text) - self.length, (self.batch_size,), generator=generator)
            ids = torch.stack([self.text[s : s + self.length] for s in starts.tolist()])
            loss, routings = model(ids)
            (loss / self.accumulate).backward()
            extra = sum(v.item() for r in routings for key, v in r.aux.items() if key.startswith("loss/"))
            total += (loss.item() - extra) / self.accumulate
            counts_LE += torch.stack([r.counts_E() for r in routings])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step()
        return total, counts_LE
