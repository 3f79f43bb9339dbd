"""Run a text through a model for the sake of its routing: documents to pieces, pieces to batches, one forward pass each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput

LOGITS_AT_ONCE = 1 << 26
"""Values of the output head per batch, for models that cannot leave them out."""

TOKENS_AT_ONCE = 4096
BATCHES_SORTED = 8


class Piece(NamedTuple):
    """Consecutive tokens of one document, at most a context long."""

    ids: list[int]
    document: int
    domain: str


class Batch(NamedTuple):
    """Padded on the right."""

    ids_BN: Tensor
    mask_BN: Tensor
    domains: list[str]
    pieces: int
    """Pieces up to and with this batch: where a run that is resumed goes on."""


def pieces(documents: Iterable[Document], tokenizer: Any, context: int) -> Iterator[Piece]:
    """Each document, begun with the tokenizer's start token where it has one, in pieces of `context` tokens."""
    start = start_token(tokenizer)
    for number, document in enumerate(documents):
        try:
            ids = list(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
        except (TypeError, UnicodeEncodeError) as error:
            raise BadInput(f"document {number} of domain {document.domain!r} is not valid Unicode text") from error
        if not ids:
            continue
        if start is not None:
            ids.insert(0, start)
        for at in range(0, len(ids), context):
            yield Piece(ids[at : at + context], number, document.domain)


def start_token(tokenizer: Any) -> int | None:
    """The token that stands before a document; None for a tokenizer that has none."""
    return next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)


def batches(found: list[Piece], size: int, pad: int, first: int = 0) -> Iterator[Batch]:
    """Batches of `size` pieces from piece `first` on; near-equal lengths together, within a few batches at a time."""
    reach = size * BATCHES_SORTED
    for at in range(0, len(found), reach):
        group = sorted(found[at : at + reach], key=lambda piece: -len(piece.ids))
        for start in range(0, len(group), size):
            some = group[start : start + size]
            done = at + start + len(some)
            if done <= first:
                continue
            rows = [torch.tensor(piece.ids) for piece in some]
            ids_BN = pad_sequence(rows, batch_first=True, padding_value=pad)
            mask_BN = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            yield Batch(ids_BN, mask_BN, [piece.domain for piece in some], done)


def context_of(config: Any, asked: int | None) -> int:
    """Tokens per piece. Raises BadInput for more than the model takes."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(longest or 2048, 2048)
    if asked < 1 or (longest and asked > longest):
        raise BadInput(f"--context {asked}: this model takes 1 to {longest or 'any number of'} tokens")
    return asked


def batch_size(model: Any, context: int) -> int:
    """Pieces per forward pass that keep activations and the output head small."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 1
    most = TOKENS_AT_ONCE if _keeps_logits(model) else min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary)
    return max(1, most // context)


def forward(model: Any, ids_BN: Tensor, mask_BN: Tensor) -> Any:
    """One pass without cache and, where the model allows it, without the output head."""
    spare: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    if model.config.is_encoder_decoder:
        spare["decoder_input_ids"] = ids_BN
        spare["decoder_attention_mask"] = mask_BN
    with torch.inference_mode():
        return model(input_ids=ids_BN, attention_mask=mask_BN, use_cache=False, **spare)


def read(
    model: Any,
    found: list[Piece],
    *,
    size: int,
    pad: int = 0,
    first: int = 0,
    before: Callable[[Batch], None] = lambda batch: None,
    after: Callable[[Batch], None] = lambda batch: None,
    run: Callable[[Any, Tensor, Tensor], Any] | None = None,
) -> None:
    """Every piece through the model, in eval mode; `before` and `after` see each batch, `run` replaces `forward`."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    training = model.training
    model.eval()
    try:
        for batch in batches(found, size, pad, first):
            before(batch)
            (run or forward)(model, batch.ids_BN.to(device), batch.mask_BN.to(device))
            after(batch)
    finally:
        model.train(training)


def write_on(model: Any, prompt: list[int], new_tokens: int, *, seed: int, temperature: float, pad: int, end: Any) -> None:
    """Continue a prompt by sampling (greedily at temperature 0), one token per pass, as a user's request would run."""
    device = next(model.parameters()).device
    ids_BN = torch.tensor([prompt], device=device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode():
        model.generate(
            ids_BN,
            attention_mask=torch.ones_like(ids_BN),
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            eos_token_id=end,
            **sampling,
        )


def _keeps_logits(model: Any) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters
