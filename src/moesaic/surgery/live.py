"""A live model to a folder: weights, config, tokenizer, recipe and card; reloaded, compared, then renamed into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.surgery.card import NOTES
from moesaic.view.load import load, quiet


def check_folder(out: Path) -> None:
    """Raises BadInput for a folder that cannot be written, or that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is not empty: name a folder that is not there yet, or delete it")
    if not out.resolve().parent.is_dir() or not os.access(out.resolve().parent, os.W_OK):
        raise BadInput(f"cannot write {out}: there is no folder {out.resolve().parent} to write in")


def write(model: Any, tokenizer: Any, out: Path, recipe: Mapping[str, Any] | None = None, said: str = "") -> None:
    """Model, tokenizer, recipe and a card of `said` beside `out`, reloaded, compared, then renamed: a killed run leaves no
    half-written folder of that name. Raises BadInput where it cannot be written, or does not come back as it was."""
    scratch = out.resolve().with_name(f".{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        if recipe is not None:
            (scratch / NOTES).write_text(json.dumps(recipe, indent=1, ensure_ascii=False, default=str) + "\n")
        if said:
            (scratch / "README.md").write_text(said)
        _compare(model, scratch, out)
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)
    except OSError as error:
        raise BadInput(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def _compare(model: Any, folder: Path, out: Path) -> None:
    """Raises BadInput where the folder, loaded anew, is another model: other weights, or other answers."""
    with quiet():
        again = load(folder, dense_ok=True).model
    want, found = model.state_dict(), again.state_dict()
    if want.keys() != found.keys():
        raise BadInput(f"{out}: written and read again, it has other tensors: {sorted(want.keys() ^ found.keys())[0]}")
    for name, tensor in want.items():
        if not torch.equal(tensor.cpu(), found[name].cpu()):
            raise BadInput(f"{out}: written and read again, {name} is not what it was")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 17).remainder(vocabulary).unsqueeze(0)
    was, device = model.training, next(model.parameters()).device
    model.eval()
    mine, theirs = model(input_ids=ids.to(device), use_cache=False).logits.cpu(), again(input_ids=ids, use_cache=False).logits
    model.train(was)
    near = 0.05 if mine.dtype in (torch.bfloat16, torch.float16) else 1e-3  # kernels of other devices round otherwise
    if not (mine.float() - theirs.float()).norm() <= near * mine.float().norm() + 1e-6:
        raise BadInput(f"{out}: written and read again, it answers otherwise")
