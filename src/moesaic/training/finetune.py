"""Fine-tuning of a live causal language model: a few steps over a text, on chosen parameters, in the model's own loss.

Weights are float32 while they learn (steps of a fine-tuning rate vanish in bfloat16) and go back to their dtypes at the end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.training.build import build_optimizer
from moesaic.training.config import TrainConfig, learning_rate
from moesaic.training.data import tokenize


def finetune(
    model: Any,
    tokenizer: Any,
    data: str | Path,
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    lr: float = 1e-4,
    warmup: int | None = None,
    batch_size: int = 4,
    seq_len: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train `parameters` (the others stand still) in place; the loss of every step, in nats per token.

    The objective is the model's `loss` for its `labels`, to which a model with balance losses adds them; where it has
    `after_step`, it is called. `warmup` is a tenth of the steps by default, the rate then falls as a cosine. Raises
    BadInput for settings or data that do not fit, or a loss that is no number; the weights are then what they were.
    """
    warmup = steps // 10 if warmup is None else warmup
    settings = {"steps": steps, "lr": lr, "warmup": warmup, "batch_size": batch_size, "seq_len": seq_len, "seed": seed}
    config = TrainConfig.model_validate({"data": str(data), "out": "", "model": {}, "weight_decay": weight_decay, **settings})
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise BadInput(f"seq_len {seq_len}: this model takes {longest} tokens")
    if tokenizer is None or tokenizer.eos_token_id is None:
        raise BadInput("fine-tuning needs a tokenizer with an end-of-text token, which separates documents")
    with tempfile.TemporaryDirectory(prefix="moesaic-finetune-") as folder:
        rows = tokenize(data, tokenizer, Path(folder) / "tokens.npz", seq_len, seed)
    kept = list(parameters)
    if not kept:
        raise BadInput("fine-tuning: there is no parameter to train")
    before = {id(p): p.data.clone() for p in kept}
    asked, dtypes = {p: p.requires_grad for p in model.parameters()}, {p: p.dtype for p in model.parameters()}
    chosen, was_training, losses = {id(p) for p in kept}, model.training, []
    device = kept[0].device
    try:
        for p in model.parameters():
            p.requires_grad_(id(p) in chosen)
            if id(p) in chosen:
                p.data = p.data.float()
        optimizer = build_optimizer(config, model)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            ids_BN = rows.rows(step * batch_size, batch_size)[:, :-1].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids_BN, labels=ids_BN, use_cache=False).loss
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
