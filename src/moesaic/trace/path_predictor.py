"""ExpertFlow's routing path predictor: from token ids to the experts of every layer, a small network trained on a trace.

One causal transformer layer of width 32 and one head per layer, trained by binary cross-entropy against the routing. The
paper's predictor is a T5-style encoder and decoder of like size; a causal one can also follow a text while it is written.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moesaic.trace.file import Trace


class Predictor(nn.Module):
    """Logits [B, N, L, E] of token ids [B, N]. Ids of `vocabulary` and more share one row."""

    def __init__(self, vocabulary: int, layers: int, experts: int, width: int = 32, inner: int = 2048, heads: int = 4) -> None:
        super().__init__()
        self.vocabulary, self.shape, self.heads = vocabulary, (layers, experts), heads
        self.embed = nn.Embedding(vocabulary + 1, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.head = nn.Linear(width, layers * experts)

    def forward(self, ids_BN: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids_BN.clamp(max=self.vocabulary))
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)).view(batch, length, *self.shape)


def _windows(trace: Trace, sequences: np.ndarray, length: int) -> list[np.ndarray]:
    """Rows of every stretch of at most `length` tokens of the sequences."""
    starts = trace.starts_S1
    return [np.arange(at, min(at + length, starts[s + 1])) for s in sequences for at in range(starts[s], starts[s + 1], length)]


def train(trace: Trace, sequences: np.ndarray, steps: int, seed: int = 0, length: int = 128, batch: int = 16) -> Predictor:
    """Train on the routing of these sequences; deterministic by `seed`."""
    assert trace.tokens_T is not None
    windows = _windows(trace, sequences, length)
    generator = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Predictor(int(np.max(trace.tokens_T, initial=0)) + 1, len(trace.layers), trace.num_experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(2, steps))
    layers, experts = model.shape
    for _ in range(steps):
        rows = [windows[i] for i in generator.integers(0, len(windows), min(batch, len(windows)))]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        goal, mask = torch.zeros(len(rows), length, layers, experts + 1), torch.zeros(len(rows), length)
        for i, r in enumerate(rows):
            chosen = np.asarray(trace.experts_TLK[r[0] : r[-1] + 1]).astype(np.int64)
            ids[i, : len(r)] = torch.from_numpy(np.asarray(trace.tokens_T[r[0] : r[-1] + 1]).astype(np.int64))
            goal[i, : len(r)].scatter_(2, torch.from_numpy(np.where(chosen == trace.empty, experts, chosen)), 1.0)
            mask[i, : len(r)] = 1
        loss = F.binary_cross_entropy_with_logits(model(ids), goal[..., :experts], reduction="none").mean((2, 3))
        optimizer.zero_grad()
        ((loss * mask).sum() / mask.sum()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model: Predictor, trace: Trace, width: int, length: int = 128) -> np.ndarray:
    """The `width` most likely experts [T, L, width] of every token and layer, best first, in 16 bits."""
    assert trace.tokens_T is not None
    out = np.zeros((len(trace), len(trace.layers), width), np.uint16)
    real_LE = torch.arange(trace.num_experts) < torch.from_numpy(trace.experts_L)[:, None]
    windows = _windows(trace, np.arange(len(trace.starts_S1) - 1), length)
    for at in range(0, len(windows), 64):
        rows = windows[at : at + 64]
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, r in enumerate(rows):
            ids[i, : len(r)] = torch.from_numpy(np.asarray(trace.tokens_T[r[0] : r[-1] + 1]).astype(np.int64))
        best = model(ids).masked_fill(~real_LE, -torch.inf).topk(width, -1).indices.numpy().astype(np.uint16)
        for i, r in enumerate(rows):
            out[r[0] : r[-1] + 1] = best[i, : len(r)]
    return out
