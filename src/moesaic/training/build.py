"""From a checked config to tokenizer, data, model and optimiser, with errors that name the field."""

from __future__ import annotations

import ctypes
import difflib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.training import attention
from moesaic.training.config import TrainConfig
from moesaic.training.data import PackedTokens, tokenize, train_tokenizer

LEGACY_FIELDS = {"rope_theta", "rope_scaling"}
"""Fields that transformers 5 still takes, and turns into others."""


def build_tokenizer(config: TrainConfig, out: Path, say: Any) -> Any:
    from transformers import AutoTokenizer

    path = Path(config.tokenizer) if config.tokenizer else out / "tokenizer"
    if not path.exists():
        if config.tokenizer:
            raise BadInput(f"tokenizer: no folder {path}")
        say(f"training a {config.vocab_size}-token byte-level BPE on {config.data}")
        scratch = out / ".tokenizer.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        train_tokenizer(config.data, config.vocab_size, scratch)
        os.replace(scratch, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"tokenizer: {path} does not load ({str(error).splitlines()[0]})") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(f"tokenizer: {path} has no end-of-text token, which separates documents")
    return tokenizer


def build_data(config: TrainConfig, name: str, tokenizer: Any, out: Path) -> PackedTokens:
    return tokenize(getattr(config, name), tokenizer, out / f"{_CACHES[name]}-tokens.npz", config.seq_len, config.seed)


_CACHES = {"data": "train", "valid": "valid"}


def build_model(config: TrainConfig, tokenizer: Any, device: str | None = None) -> Any:
    """A fresh model of the config's architecture on its device, or on another.

    Raises BadInput naming the field that does not fit.
    """
    from transformers import AutoModelForCausalLM

    import moesaic.view  # noqa: F401  (makes experts_implementation="moesaic" known)

    settings = _model_config(config, tokenizer)
    longest = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.seq_len > longest:
        raise BadInput(f"seq_len: {config.seq_len} is more than model.max_position_embeddings, {longest}")
    try:
        model = AutoModelForCausalLM.from_config(settings, experts_implementation=config.experts_implementation)
    except MoesaicError as error:
        raise BadInput(f"model: {_line(error)}") from error
    except (ValueError, KeyError, ImportError) as error:
        if "experts" in str(error).lower():
            raise BadInput(f"experts_implementation: {_line(error)}") from error
        raise BadInput(f"model: {_line(error)}") from error
    try:
        _set_attention(model, config)
    except (ValueError, KeyError, ImportError) as error:
        raise BadInput(f"attention: {_line(error)}") from error
    try:
        return model.to(device or config.device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"device: {config.device}: {_line(error)}") from error


def _model_config(config: TrainConfig, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    fields = dict(config.model)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise BadInput("model.model_type is missing: name a transformers architecture, such as qwen3_moe")
    try:
        known = AutoConfig.for_model(kind)
    except (ValueError, TypeError) as error:
        raise BadInput(f"model.model_type: transformers has no architecture {kind!r}") from error
    for name in fields:
        if not hasattr(known, name) and name not in LEGACY_FIELDS and not _read_by(known, name):
            close = difflib.get_close_matches(name, {*known.to_dict(), *known.attribute_map}, 1)
            raise BadInput(f"model.{name}: {kind} has no such field" + (f"; did you mean {close[0]}?" if close else ""))
    if fields.get("vocab_size", len(tokenizer)) < len(tokenizer):
        raise BadInput(f"model.vocab_size: {fields['vocab_size']} is less than the tokenizer's {len(tokenizer)}")
    given = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **fields}
    if fields.get("causal") is False and hasattr(known, "mask_token_id"):  # guesses hidden tokens: one more hides them
        given = {"mask_token_id": len(tokenizer), **given, "vocab_size": fields.get("vocab_size", len(tokenizer) + 1)}
    if config.balance and hasattr(known, "balance"):  # a model that balances by itself
        if fields.get("balance"):
            raise BadInput("balance and model.balance: give one of them")
        given["balance"] = config.balance
    if config.balance_scope != "micro_batch" and hasattr(known, "balance_scope"):
        given["balance_scope"] = config.balance_scope
    try:
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers' validators raise classes of their own
        raise BadInput(f"model: {_line(error)}") from error


def _read_by(known: Any, name: str) -> bool:
    """Whether the architecture's own code mentions a field that its configuration does not declare (Qwen3-MoE: head_dim)."""
    from transformers import AutoModelForCausalLM

    if type(known) not in AutoModelForCausalLM._model_mapping:
        return True
    model_class: Any = AutoModelForCausalLM._model_mapping[type(known)]
    return re.search(rf"\b{re.escape(name)}\b", inspect.getsource(inspect.getmodule(model_class))) is not None  # type: ignore[arg-type]


def _set_attention(model: Any, config: TrainConfig) -> None:
    if config.attention != "auto":
        model.set_attn_implementation(attention.install() if config.attention == attention.NAME else config.attention)
    elif config.device == "cpu" and config.seq_len <= attention.LONGEST and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.install())


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks: fresh pages cost a third of a small model's step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, 256 << 20)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
