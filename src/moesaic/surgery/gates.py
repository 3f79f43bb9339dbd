"""Where the router of an upcycled model starts: random rows, or rows that point to what prompts look like.

Shape legend: E experts, D width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.surgery.dense import Dense
from moesaic.surgery.parts import Lazy, Part

STD = 0.02
HOW = ("random", "prompts", "embedding")

Prompts = list[dict[str, list[str]]]
"""For each expert: positive prompts, and maybe negative ones."""


class Gates:
    """Router rows by layer. `how`: random (N(0, 0.02^2)), prompts (mean hidden state at the layer's FFN) or embedding (mean of
    the tokens' embeddings, the same in every layer). Card: prompt gates.

    `prompts` is a file, or its content: a list with an entry per row, a list of texts or {positive: [...], negative: [...]}.
    A row is the mean over the positive prompts' tokens minus that over the negative ones', brought to length `scale`
    (with `last`, over last tokens only).
    """

    def __init__(self, how: str, rows: int, prompts: Any = None, seed: int = 0, last: bool = False, scale: float = 1.0) -> None:
        if how not in HOW:
            raise BadInput(f"router={how!r}: one of {', '.join(HOW)}")
        if how == "random" and prompts is not None:
            raise BadInput("prompts: router=random reads none; choose router=prompts or router=embedding")
        self.how, self.rows, self.seed, self.last, self.scale = how, rows, seed, last, scale
        self.prompts = [] if how == "random" else read_prompts(prompts, rows)
        self.found: dict[int, Tensor] = {}

    def prepare(self, dense: Dense, layers: Sequence[int], trust_remote_code: bool = False) -> None:
        """Read the prompts where rows come from them."""
        if self.how == "prompts":
            self.found = hidden_rows(dense, self.prompts, layers, self.last, trust_remote_code)
        elif self.how == "embedding":
            self.found = dict.fromkeys(layers, embedding_rows(dense, self.prompts, self.last))

    def part(self, dense: Dense, layer: int, repeat: int = 1) -> Part:
        """[rows * repeat, D]: each row `repeat` times in a row."""
        like = dense.ffn(layer)["gate"]
        shape = (self.rows * repeat, like.shape[1])

        def make() -> Tensor:
            if self.how == "random":
                random = torch.Generator().manual_seed(self.seed * 100_003 + layer)
                rows_ED = STD * torch.randn(self.rows, like.shape[1], generator=random)
            else:
                rows_ED = self.found[layer]
                rows_ED = self.scale * rows_ED / rows_ED.norm(dim=1, keepdim=True).clamp(min=1e-12)
            return rows_ED.repeat_interleave(repeat, 0).to(like.dtype)

        return Lazy(like.dtype, shape, make)


def read_prompts(given: Any, rows: int) -> Prompts:
    """Raises BadInput for a file that is no list of prompts, or of another number of entries than there are rows."""
    if given is None:
        raise BadInput(f"prompts are missing: a file with a list of {rows} entries, one per expert, each a list of texts")
    where = "prompts"
    if isinstance(given, str | Path):
        import yaml

        where = str(given)
        try:
            given = yaml.safe_load(Path(given).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadInput(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(given, list) or len(given) != rows:
        raise BadInput(f"{where}: a list of {rows} entries, one per expert, is wanted; it is {_what(given)}")
    found = []
    for number, entry in enumerate(given):
        sides = entry if isinstance(entry, dict) else {"positive": entry}
        if set(sides) - {"positive", "negative"} or not sides.get("positive"):
            raise BadInput(f"{where}, entry {number}: a list of texts, or {{positive: [...], negative: [...]}}")
        made = {key: [value] if isinstance(value, str) else value for key, value in sides.items()}
        if not all(isinstance(texts, list) and all(isinstance(t, str) and t for t in texts) for texts in made.values()):
            raise BadInput(f"{where}, entry {number}: prompts are texts")
        found.append(made)
    return found


def _what(given: Any) -> str:
    return f"a list of {len(given)}" if isinstance(given, list) else type(given).__name__


def tokenizer_of(dense: Dense) -> Any:
    """Raises BadInput where the folder has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(dense.folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{dense.folder} has no tokenizer that can be loaded: prompts are texts") from error


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def hidden_rows(
    dense: Dense, prompts: Prompts, layers: Sequence[int], last: bool, trust_remote_code: bool = False
) -> dict[int, Tensor]:
    """By layer [E, D]: mean input of its FFN over the positive prompts' tokens minus that over the negative ones'."""
    from moesaic.view.load import load

    model, tokenizer = load(dense.folder, dense_ok=True, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise BadInput(f"{dense.folder} has no tokenizer: prompts are texts")
    stack, seen = model.get_decoder().layers, dict[int, Tensor]()
    handles = [
        stack[layer].mlp.register_forward_pre_hook(lambda m, args, at=layer: seen.__setitem__(at, args[0][0].float()))
        for layer in layers
    ]
    found = {layer: torch.zeros(len(prompts), dense.config.hidden_size) for layer in layers}
    try:
        for e, entry in enumerate(prompts):
            for side, sign in (("positive", 1.0), ("negative", -1.0)):
                rows = {layer: list[Tensor]() for layer in layers}
                for text in entry.get(side, []):
                    with torch.no_grad():
                        model(input_ids=torch.tensor([_ids(tokenizer, text)]), use_cache=False)
                    for layer in layers:
                        rows[layer].append(seen[layer][-1:] if last else seen[layer])
                for layer in layers:
                    if rows[layer]:
                        found[layer][e] += sign * torch.cat(rows[layer]).mean(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def embedding_rows(dense: Dense, prompts: Prompts, last: bool) -> Tensor:
    """[E, D] from the rows of the embedding table that the prompts' tokens have; nothing else is read."""
    tokenizer, table = tokenizer_of(dense), dense.table["model.embed_tokens.weight"]
    rows_ED = torch.zeros(len(prompts), table.shape[1])
    for e, entry in enumerate(prompts):
        for side, sign in (("positive", 1.0), ("negative", -1.0)):
            ids = [t for text in entry.get(side, []) for t in (_ids(tokenizer, text)[-1:] if last else _ids(tokenizer, text))]
            if ids:
                rows_ED[e] += sign * torch.cat([dense.reader.read(table.rows(t, t + 1)).float() for t in ids]).mean(0)
    return rows_ED
