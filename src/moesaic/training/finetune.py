"""Fine-tuning of a live causal language model: a few steps over texts, on chosen parameters, in its own loss or another.

Weights are float32 while they learn (steps of a fine-tuning rate vanish in bfloat16) and go back to their dtypes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.documents import Document, read_documents
from moesaic.core.errors import BadInput
from moesaic.training.build import build_optimizer
from moesaic.training.config import TrainConfig, learning_rate
from moesaic.training.data import PackedTokens, encode
from moesaic.training.snapshots import Snapshots, Stateful

Text = Any
"""A file or folder, a list of documents, or an object whose `rows(first, count)` gives a tensor or named tensors."""


def finetune(
    model: Any,
    tokenizer: Any,
    data: Text | Mapping[str, Text],
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    lr: float = 1e-4,
    warmup: int | None = None,
    batch_size: int = 4,
    seq_len: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
    objective: Callable[[Any, dict[str, Tensor]], Tensor] | None = None,
    stop: Callable[[int], bool] = lambda done: False,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    after: Callable[[int], None] = lambda done: None,
    snapshot: Path | None = None,
    state: Stateful | None = None,
) -> list[float]:
    """Train `parameters` (the model's others stand still) in place; the loss of every step, in nats per token.

    Args:
        data: a text, or several by name (forget and retain, say). Each step draws `batch_size` sequences of `seq_len`
            tokens from each.
        parameters: of the model, or standing in for parts of it.
        objective: objective(model, batch) -> a scalar to descend, where batch maps names of `data` to ids [B, N] (or what
            its `rows` names). By default the model's `loss` for its `labels`, to which a model with balance losses adds
            them, on the one text.
        stop: asked after every step, with the number of steps done; True ends the training there.
        after: called after every step, with the number of steps done, before `stop`: what the step must not have changed is
            put right here.
        snapshot: a file that holds the state of the training now and then; where there is one already, the training goes on
            from it, with the losses of a whole run. `state` is what else has to be kept in it.

    Where the model has `after_step`, it is called. `warmup` is a tenth of the steps by default, the rate then falls as a
    cosine. Raises BadInput for settings or data that do not fit, or a loss that is no number; the weights are then what
    they were.
    """
    warmup = steps // 10 if warmup is None else warmup
    settings = {"steps": steps, "lr": lr, "warmup": warmup, "batch_size": batch_size, "seq_len": seq_len, "seed": seed}
    config = TrainConfig.model_validate({"data": "", "out": "", "model": {}, "weight_decay": weight_decay, **settings})
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise BadInput(f"seq_len {seq_len}: this model takes {longest} tokens")
    named = dict(data) if isinstance(data, Mapping) else {"text": data}
    if objective is None and len(named) != 1:
        raise BadInput(f"fine-tuning in the model's own loss takes one text, given {', '.join(named) or 'none'}")
    rows = {name: _rows(text, tokenizer, name, seq_len, seed) for name, text in named.items()}
    kept = list(parameters)
    if not kept:
        raise BadInput("fine-tuning: there is no parameter to train")
    before = {id(p): p.data.clone() for p in kept}
    everything = list({id(p): p for p in (*model.parameters(), *kept)}.values())
    asked, dtypes = {p: p.requires_grad for p in everything}, {p: p.dtype for p in everything}
    chosen, was_training = {id(p) for p in kept}, model.training
    losses: list[float] = []
    device = kept[0].device
    own = objective is None
    loss_of = _own_loss if objective is None else objective
    try:
        for p in everything:
            p.requires_grad_(id(p) in chosen)
            if id(p) in chosen:
                p.data = p.data.float()
        optimizer = build_optimizer(config, nn.ParameterList(kept))
        model.train()
        keeper = None if snapshot is None else Snapshots(snapshot, kept, dict(model.named_buffers()), optimizer, state)
        ended = False
        if keeper is not None:
            losses, ended = keeper.load()
        for step in range(steps if ended else len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batch = _batch(rows, step * batch_size, batch_size, device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(model, {"text": next(iter(batch.values()))} if own else batch)
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(kept, config.clip))
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                raise BadInput(f"step {step}: loss {loss.item()}, gradient norm {norm}: fine-tuning diverged; lower lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if hasattr(model, "after_step"):
                model.after_step()
            losses.append(loss.item())
            progress(step, losses[-1])
            after(step + 1)
            ended = stop(step + 1) or step + 1 == steps
            if keeper is not None:
                keeper.save(losses, ended)
            if ended:
                break
    except BaseException:
        for p in kept:
            p.data = before[id(p)]
        raise
    finally:
        for p, wanted in asked.items():
            p.requires_grad_(wanted)
            p.data = p.data.to(dtypes[p])
            p.grad = None
        model.train(was_training)
    return losses


def _own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["text"], labels=batch["text"], use_cache=False).loss


def _rows(text: Text, tokenizer: Any, name: str, seq_len: int, seed: int) -> Any:
    """What gives the batches of one text."""
    if hasattr(text, "rows"):
        return text
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise BadInput("fine-tuning needs a tokenizer with an end-of-text token, which separates documents")
    documents: Iterable[Document] = read_documents(text) if isinstance(text, str | Path) else text
    try:
        return PackedTokens(*encode(documents, tokenizer), seq_len, seed)
    except BadInput as error:
        raise BadInput(f"{text if isinstance(text, str | Path) else name}: {error}") from error


def _batch(rows: Mapping[str, Any], first: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """Ids [B, N] by name; what a source names itself is `name/its name`."""
    batch = {}
    for name, source in rows.items():
        found = source.rows(first, count)
        if isinstance(found, Tensor):
            batch[name] = (found[:, :-1] if isinstance(source, PackedTokens) else found).to(device)
        else:
            batch |= {f"{name}/{key}": value.to(device) for key, value in found.items()}
    return batch
