"""Bits per byte and perplexity per domain: what a model would need to write each document down, every byte paid for.

A document is scored whole: its first token is predicted from the start token (the tokenizer's bos, else its
end-of-text), later ones through sliding windows. Bytes are those of the text in UTF-8, so models with different
tokenizers, and file compressors, compare on one scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moesaic.core.documents import Document, utf8
from moesaic.core.errors import BadInput
from moesaic.evaluation.windows import Window, batches, windows
from moesaic.trace import corpus

LOGITS_AT_ONCE = 1 << 26
"""Logits of one batch, in numbers: 256 MB in float32. Decides the default batch size."""
ROWS_AT_ONCE = 2048
"""Rows of logits turned into float32 log-probabilities at a time."""


@dataclass
class Score:
    """Sums over the documents of one domain."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    lossy_documents: int = 0
    """Documents whose text the tokenizer does not give back: their bits do not pay for every byte."""
    texts: list[str] = field(default_factory=list, repr=False)

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    @property
    def perplexity(self) -> float | None:
        return math.exp(min(self.nats / self.tokens, 700)) if self.tokens else None

    def row(self) -> dict[str, Any]:
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "lossy_documents": self.lossy_documents,
        }


def score_documents(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    context: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Score]:
    """Score every document; returns domain -> Score in order of appearance.

    `context` is the longest input (default: the model's, at most 2,048), `stride` the tokens scored per further window
    (default: half the context); `progress(done, total)` counts tokens. Raises BadInput for values that make no sense.
    """
    context, stride = check_sizes(model.config, context, stride)
    start = start_token(tokenizer)
    scores: dict[str, Score] = {}
    ids: list[list[int]] = []
    domains: list[str] = []
    todo: list[Window] = []
    for document in documents:
        score = scores.setdefault(document.domain, Score())
        score.bytes += len(utf8(document))
        tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] if document.text else []
        score.documents += 1
        score.tokens += len(tokens)
        score.lossy_documents += not round_trips(tokenizer, tokens, document.text)
        score.texts.append(document.text)
        todo.extend(windows(len(ids), len(tokens) + 1, context, stride))
        ids.append([start, *tokens])
        domains.append(document.domain)
    if not any(score.bytes for score in scores.values()):
        raise BadInput("the data holds no text to score")
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or len(tokenizer)
    size = batch_size or max(1, min(16, LOGITS_AT_ONCE // (context * vocabulary)))
    done, total = 0, sum(score.tokens for score in scores.values())
    training = model.training
    model.eval()
    try:
        for batch in batches(todo, size):
            for window, nats in zip(batch, _score_batch(model, batch, ids), strict=True):
                scores[domains[window.document]].nats += nats
                done += window.scored
            progress(done, total)
    finally:
        model.train(training)
    return scores


@torch.inference_mode()
def _score_batch(model: nn.Module, batch: list[Window], ids: list[list[int]]) -> list[float]:
    """Nats of each window's scored tokens. Shorter windows are padded at the end, which no earlier token can see."""
    device = next(model.parameters()).device
    longest = max(window.length for window in batch)
    inputs = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, window in enumerate(batch):
        inputs[row, : window.length] = torch.tensor(ids[window.document][window.start : window.end])
    logits = model(input_ids=inputs.to(device), use_cache=False).logits
    totals = []
    for row, window in enumerate(batch):
        first = window.length - window.scored
        targets = torch.tensor(ids[window.document][window.start + first + 1 : window.end + 1], device=device)
        total = 0.0
        for at in range(0, window.scored, ROWS_AT_ONCE):
            some = targets[at : at + ROWS_AT_ONCE]
            part = logits[row, first + at : first + at + len(some)].float()
            total += nn.functional.cross_entropy(part, some, reduction="none").double().sum().item()
        totals.append(total)
    return totals


def check_sizes(config: Any, context: int | None, stride: int | None) -> tuple[int, int]:
    """Context and stride to use. Raises BadInput when they do not fit the model or each other."""
    context = corpus.context_of(config, context)
    if stride is None:
        stride = max(1, context // 2)
    if not 1 <= stride <= context:
        raise BadInput(f"--stride {stride}: must be from 1 to the context, {context}")
    return context, stride


def start_token(tokenizer: Any) -> int:
    """The token that stands before a document. Raises BadInput for a tokenizer that has none."""
    start = corpus.start_token(tokenizer)
    if start is None:
        raise BadInput("the tokenizer has neither a bos nor an eos token: a document's first token has nothing before it")
    return start


def round_trips(tokenizer: Any, tokens: list[int], text: str) -> bool:
    decoded = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False) if tokens else ""
    return decoded == text


def report(model: str, scores: dict[str, Score]) -> dict[str, Any]:
    """The command's JSON object: overall (total bits over total bytes), the mean over domains, and each domain."""
    rows = {name: score.row() for name, score in scores.items()}
    total = Score(
        nats=sum(s.nats for s in scores.values()),
        tokens=sum(s.tokens for s in scores.values()),
        bytes=sum(s.bytes for s in scores.values()),
    )
    values = [row["bits_per_byte"] for row in rows.values() if row["bits_per_byte"] is not None]
    return {
        "model": model,
        "bits_per_byte": total.bits_per_byte,
        "mean_bits_per_byte": sum(values) / len(values),
        "perplexity": total.perplexity,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "domains": rows,
    }
