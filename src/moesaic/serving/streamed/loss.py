"""What a lossy mode costs, measured: its outputs against those of exact routing on the same text, token by token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput

if TYPE_CHECKING:
    from moesaic.serving.streamed import Streamed

MOST_LOGITS = 1 << 27
"""Log-probabilities kept at a time, in numbers: 512 MB. Longer texts are cut."""


@dataclass(frozen=True)
class Loss:
    """Over `loss_tokens` predicted tokens. `kl_nats_per_token`: KL(exact || lossy). `overlap`: share of the routers' choices
    that ran, in their own layer. Rates are those of decoding, one token per pass."""

    loss_tokens: int
    kl_nats_per_token: float
    bits_per_byte: float
    bits_per_byte_exact: float
    overlap: float | None
    lossy_hit_rate: float
    exact_hit_rate: float
    lossy_read_bytes_per_token: float
    exact_read_bytes_per_token: float

    @property
    def bits_per_byte_difference(self) -> float:
        return self.bits_per_byte - self.bits_per_byte_exact

    def row(self) -> dict[str, Any]:
        """As keys of a JSON object."""
        return {**asdict(self), "bits_per_byte_difference": self.bits_per_byte_difference}


def measure(streamed: Streamed, texts: list[list[int]]) -> Loss:
    """Read texts (token ids, each with something before its first predicted token) once lossy, then once exactly.

    Every token is a pass of its own, as in decoding: what is in memory then is what the mode meets in use. The engine's
    counts begin anew. Raises BadInput where no text has two tokens.
    """
    vocabulary = streamed.model.config.get_text_config().vocab_size
    texts = _cut([ids for ids in texts if len(ids) > 1], max(2, MOST_LOGITS // vocabulary))
    if not texts:
        raise BadInput("measuring the loss takes a text of two tokens or more")
    engine = streamed.engine
    engine.clear()
    lossy = [_log_probabilities(streamed.model, ids) for ids in texts]
    tokens = sum(len(ids) - 1 for ids in texts)
    stats = engine.stats
    found: dict[str, Any] = {
        "overlap": stats.overlap, "lossy_hit_rate": stats.hit_rate, "lossy_read_bytes_per_token": stats.read_bytes / tokens
    }  # fmt: skip
    engine.clear()
    divergence, ours, theirs, size = 0.0, 0.0, 0.0, 0
    with engine.without_loss():
        for ids, log_q_TV in zip(texts, lossy, strict=True):
            log_p_TV = _log_probabilities(streamed.model, ids)
            next_T1 = torch.tensor(ids[1:])[:, None]
            divergence += (log_p_TV.exp() * (log_p_TV - log_q_TV)).nan_to_num(0).double().sum().item()
            ours -= log_q_TV.gather(1, next_T1).double().sum().item()
            theirs -= log_p_TV.gather(1, next_T1).double().sum().item()
            size += len(streamed.tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False).encode())
    exact, scale = engine.stats, 1 / math.log(2) / max(1, size)
    return Loss(
        tokens, divergence / tokens, ours * scale, theirs * scale, exact_hit_rate=exact.hit_rate,
        exact_read_bytes_per_token=exact.read_bytes / tokens, **found,
    )  # fmt: skip


def _cut(texts: list[list[int]], most: int) -> list[list[int]]:
    kept = []
    for ids in texts:
        if most < 2:
            break
        kept.append(ids[:most])
        most -= len(kept[-1])
    return [ids for ids in kept if len(ids) > 1]


@torch.inference_mode()
def _log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Of every token after the first, [T - 1, V] in float32."""
    cache, rows = None, []
    for token in ids[:-1]:
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(torch.log_softmax(output.logits[0, -1].float(), -1))
    return torch.stack(rows)
