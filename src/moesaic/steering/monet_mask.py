"""Monet knowledge editing: pairs that serve one domain are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing
from moesaic.core.registry import register
from moesaic.steering.kept import kept
from moesaic.steering.pairs import banks, instead, masked
from moesaic.steering.steer import Steer
from moesaic.view.course import Course


@register(
    "steering", "monet_mask", paper="2412.04139", card="surgery-and-steering.md#monet-knowledge-editing-mask-domain-experts",
    exact=False,
)  # fmt: skip
class MonetMask(Steer):
    """Experts (i, j) of Monet banks with weight 0, the others as they were: nothing is renormalised, so mass falls.

    `file`: masks of `write_masks`; `pairs`: {bank number: [[i, j], ...]}; `rows`: {bank number: [i, ...]} masks whole rows,
    which is the key's gate at 0; `columns` alike. Only masks can do this: the factored weights share each half among n experts.
    Attribution is in steering/pairs.py (`measuring`, `owned`, `correlated`). The mask holds for a whole call, so answers
    under it share none.
    """

    files: ClassVar[frozenset[str]] = frozenset({"file"})
    alone = "a Monet mask holds for a whole call"

    def __init__(
        self,
        file: str | None = None,
        pairs: Mapping[int, Sequence[Sequence[int]]] | None = None,
        rows: Mapping[int, Sequence[int]] | None = None,
        columns: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        if file is None and not (pairs or rows or columns):
            raise BadInput("monet_mask: give file, pairs, rows or columns")
        self.given = None if file is None else kept(read_masks, file)
        self.pairs, self.rows, self.columns = pairs or {}, rows or {}, columns or {}

    def check(self) -> None:
        self.banks = banks(self.model)
        self.masks = [torch.zeros(bank.n, bank.n, dtype=torch.bool) for bank in self.banks]
        for number in {*self.pairs, *self.rows, *self.columns}:
            if not 0 <= number < len(self.banks):
                raise BadInput(f"monet_mask: no bank {number!r}: the model has {len(self.banks)}")
            n, mask_NN = self.banks[number].n, self.masks[number]
            keys = [k for p in self.pairs.get(number, ()) for k in p]
            keys += [*self.rows.get(number, ()), *self.columns.get(number, ())]
            if any(not 0 <= key < n for key in keys):
                raise BadInput(f"monet_mask: keys of bank {number} are 0 to {n - 1}")
            for i, j in self.pairs.get(number, ()):
                mask_NN[i, j] = True
            mask_NN[list(self.rows.get(number, ()))] = True
            mask_NN[:, list(self.columns.get(number, ()))] = True
        if self.given is not None:
            if [mask.shape for mask in self.given] != [mask.shape for mask in self.masks]:
                raise BadInput(f"monet_mask: the file masks {len(self.given)} banks of other sizes than this model's")
            self.masks = [mask | own for mask, own in zip(self.masks, self.given, strict=True)]

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return Course(around=lambda: instead(self.banks, lambda at, bank, x, gates: masked(bank, x, gates, self.masks[at])))


def write_masks(path: str | Path, masks: Sequence[Tensor]) -> Path:
    """Masks of a model's banks, in order, as a bit per pair."""
    weights_8 = 2 ** torch.arange(8)
    tensors = {}
    for number, mask_NN in enumerate(masks):
        padded = torch.nn.functional.pad(mask_NN.flatten().long(), (0, -mask_NN.numel() % 8))
        tensors[f"bank{number}"] = (padded.view(-1, 8) * weights_8).sum(1).to(torch.uint8)
        tensors[f"keys{number}"] = torch.tensor([mask_NN.shape[0]])
    with replacing(path) as scratch:
        save_file(tensors, scratch)
    return Path(path)


def read_masks(path: str | Path) -> list[Tensor]:
    """Raises BadInput for a file that is none."""
    try:
        tensors = load_file(path)
        masks = []
        for number in range(len(tensors) // 2):
            n = int(tensors[f"keys{number}"])
            bits = (tensors[f"bank{number}"].long().unsqueeze(1) >> torch.arange(8)) & 1
            masks.append(bits.flatten()[: n * n].view(n, n).bool())
        return masks
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise BadInput(f"{path}: no file of Monet masks ({error})") from error
