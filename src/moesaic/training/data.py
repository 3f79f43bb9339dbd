"""Documents to packed token sequences. The batch of a step is a pure function of (seed, step), so resuming is exact."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.core.documents import Document, data_files, read_documents
from moesaic.core.errors import BadInput


def train_tokenizer(data: str | Path, vocab_size: int, out: str | Path) -> None:
    """Train a byte-level BPE on the documents under `data` and save it as a transformers tokenizer in `out`.

    Every byte is in the vocabulary, so any text round-trips; `<|endoftext|>` (id 0) ends a document.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # A word with one sign or space before it, up to two digits, a run of signs, line ends, indentation.
    words = r"[^\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+| ?\p{N}{1,2}| ?[^\s\p{L}\p{M}\p{N}]+\n*|[^\S\n]*\n+|[^\S\n]+(?=[^\S\n])|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((doc.text for doc in read_documents(data)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    ).save_pretrained(str(out))


class PackedTokens:
    """Token ids of a corpus with document bounds, packed into sequences that change every epoch.

    Documents are shuffled per epoch, joined by the end-of-text token, and cut into rows of seq_len + 1 (inputs and
    next-token targets overlap by one); then the rows are shuffled, since long documents would fill whole batches.
    """

    def __init__(self, ids_N: np.ndarray, starts: np.ndarray, seq_len: int, seed: int):
        if len(ids_N) <= seq_len + 1:
            raise BadInput(f"the data has {len(ids_N)} tokens, fewer than one sequence of {seq_len}: give more text")
        self.ids_N, self.starts, self.seq_len, self.seed = ids_N, starts, seq_len, seed
        self.rows_per_epoch = (len(ids_N) - 1) // seq_len
        self.fingerprint = ""
        self._epoch, self._order_N, self._row_order = -1, ids_N, np.zeros(0, np.int64)

    def rows(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count` of the endless stream, int64 [count, seq_len + 1]."""
        return torch.from_numpy(np.stack([self._row(first + i) for i in range(count)]).astype(np.int64))

    def _row(self, index: int) -> np.ndarray:
        epoch, row = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng([self.seed, epoch])
            order = random.permutation(len(self.starts) - 1)
            self._order_N = np.concatenate([self.ids_N[self.starts[i] : self.starts[i + 1]] for i in order])
            self._row_order = random.permutation(self.rows_per_epoch)
            self._epoch = epoch
        at = int(self._row_order[row]) * self.seq_len
        return self._order_N[at : at + self.seq_len + 1]


def encode(documents: Iterable[Document], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all documents, each ended by end-of-text, and where each begins (and the last one ends)."""
    texts = [document.text for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    rows = [np.asarray([*ids, tokenizer.eos_token_id], dtype) for ids in encoded]
    return np.concatenate([np.zeros(0, dtype), *rows]), np.cumsum([0, *map(len, rows)])


def tokenize(data: str | Path, tokenizer: Any, cache: Path, seq_len: int, seed: int) -> PackedTokens:
    """Encode every document (followed by end-of-text) once; `cache` (.npz) serves until the data or tokenizer change."""
    fingerprint = data_fingerprint(data, tokenizer)
    saved = _read_cache(cache, fingerprint)
    if saved is None:
        saved = encode(read_documents(data), tokenizer)
        scratch = cache.with_name(f".{cache.stem}.partial.npz")
        np.savez(scratch, ids=saved[0], starts=saved[1], fingerprint=np.array(fingerprint))
        os.replace(scratch, cache)
    try:
        packed = PackedTokens(*saved, seq_len, seed)
    except BadInput as error:
        raise BadInput(f"{data}: {error}") from error
    packed.fingerprint = fingerprint
    return packed


def data_fingerprint(data: str | Path, tokenizer: Any) -> str:
    """Changes with the files' names, sizes and times, and with the tokenizer."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in data_files(data)]
    vocabulary = tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else str(tokenizer.get_vocab())
    return hashlib.sha256(repr((files, vocabulary)).encode()).hexdigest()[:32]


def _read_cache(cache: Path, fingerprint: str) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(cache) as saved:
            if "fingerprint" in saved and str(saved["fingerprint"]) == fingerprint:
                return saved["ids"], saved["starts"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    return None
