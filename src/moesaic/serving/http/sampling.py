"""How one request draws its tokens. Each choice has a random generator of its own, so its draws owe nothing to others'.

V: vocabulary. Logits arrive as float32 on the CPU: a seed then means the same on every device.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 512
"""Candidates tried first for top-p: most nuclei fit, and a vocabulary need not be sorted."""


@dataclass(frozen=True)
class Options:
    """A request's sampling fields. Temperature 0 takes the most likely token; top_k 0 takes all; logprobs None gives none."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Drawn:
    """A token, and (where asked for) its log-probability and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws for one choice. Choice i of a request uses seed + i."""

    def __init__(self, options: Options, choice: int) -> None:
        self.options = options
        self.counts: dict[int, int] = {}
        self._generator: torch.Generator | None = None
        if options.temperature > 0:
            seed = secrets.randbits(63) if options.seed is None else options.seed + choice
            self._generator = torch.Generator().manual_seed(seed % (1 << 64))

    def draw(self, logits_V: Tensor) -> Drawn:
        """The next token. Log-probabilities are the model's own: before penalties, bias and temperature."""
        token = self._choose(self._adjusted(logits_V))
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.options.logprobs is None:
            return Drawn(token)
        logprobs_V = torch.log_softmax(logits_V, -1)
        values, ids = logprobs_V.topk(min(self.options.logprobs, logprobs_V.numel()))
        return Drawn(token, logprobs_V[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        options = self.options
        penalised = bool(self.counts) and bool(options.frequency_penalty or options.presence_penalty)
        if not penalised and not options.logit_bias:
            return logits_V
        logits_V = logits_V.clone()
        if penalised:
            seen, times = torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()), dtype=torch.float32)
            logits_V[seen] -= options.frequency_penalty * times + options.presence_penalty
        for token, bias in options.logit_bias:
            logits_V[token] += bias
        return logits_V

    def _choose(self, logits_V: Tensor) -> int:
        options = self.options
        if self._generator is None:
            return int(logits_V.argmax())
        # The largest logit becomes 0 first, and float32 has a smallest divisor: a tiny temperature must not give NaN.
        scaled_V = (logits_V - logits_V.max()) / max(options.temperature, 1e-30)
        ids = None
        if 0 < options.top_k < scaled_V.numel():
            scaled_V, ids = scaled_V.topk(options.top_k)
        probs_V = torch.softmax(scaled_V, -1)
        if options.top_p < 1:
            probs_V, kept = _nucleus(probs_V, options.top_p)
            ids = kept if ids is None else ids[kept]
        at = int(torch.multinomial(probs_V, 1, generator=self._generator))
        return at if ids is None else int(ids[at])


def _nucleus(probs_V: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens that together hold at least top_p, and their ids; never fewer than one."""
    few = min(FEW, probs_V.numel())
    values, ids = probs_V.topk(few)
    before = values.cumsum(-1) - values
    if few < probs_V.numel() and float(before[-1]) < top_p:
        values, ids = probs_V.sort(descending=True)
        before = values.cumsum(-1) - values
    keep = before < top_p
    keep[0] = True
    return values[keep], ids[keep]
