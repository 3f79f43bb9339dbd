"""The training loop of a causal language model: one config in, one checkpoint that stock transformers loads out."""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.training import attention, checkpoint
from moesaic.training.config import TrainConfig, learning_rate
from moesaic.training.data import PackedTokens, tokenize, train_tokenizer
from moesaic.training.loss import linear_cross_entropy, plain_head


class RouterTap:
    """Collects the raw logits and choices of every router during a forward pass, with gradient."""

    def __init__(self, model: nn.Module):
        recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        self.index = getattr(recorder, "index", 0)
        self.calls: list[tuple[Tensor, Tensor]] = []
        routers = [m for m in model.modules() if kind is not None and isinstance(m, kind)]
        for router in routers:
            router.register_forward_hook(self._record)
        self.layers = len(routers)

    def _record(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.append((output[self.index], output[2]))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        calls, self.calls = self.calls, []
        return calls


def balance_losses(calls: list[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Switch loss and z-loss, averaged over layers, and the load f [L, E] (sums to 1 per layer)."""
    switch, z, load = [], [], []
    for logits_TE, experts_TK in calls:
        logits_TE = logits_TE.float()
        experts = logits_TE.shape[1]
        f_E = torch.bincount(experts_TK.reshape(-1), minlength=experts).float() / experts_TK.numel()
        switch.append(experts * (f_E * logits_TE.softmax(-1).mean(0)).sum())
        z.append(logits_TE.logsumexp(-1).square().mean())
        load.append(f_E)
    return {"switch": torch.stack(switch).mean(), "z": torch.stack(z).mean()}, torch.stack(load)


def keep_freed_memory() -> None:
    """Ask glibc to reuse large blocks: fresh pages cost a third of a small model's step on a CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1), libc.mallopt(-2, 256 << 20)


class Trainer:
    """Runs a TrainConfig. `run()` resumes from the newest checkpoint in `out` and ends with `out/final`."""

    def __init__(self, config: TrainConfig, console: Console | None = None):
        self.config, self.console = config, console or Console(stderr=True)
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if config.threads:
            torch.set_num_threads(config.threads)
        keep_freed_memory()
        torch.manual_seed(config.seed)
        self.tokenizer = self._tokenizer()
        self.train_data = self._tokens(config.data, "train")
        self.valid_data = self._tokens(config.valid, "valid") if config.valid else None
        self.model = self._model().to(config.device)
        self.head = plain_head(self.model)
        self.tap = RouterTap(self.model)
        self.optimizer = self._optimizer()

    def _tokenizer(self):
        from transformers import AutoTokenizer

        path = Path(self.config.tokenizer) if self.config.tokenizer else self.out / "tokenizer"
        if not path.exists():
            if self.config.tokenizer:
                raise BadInput(f"no tokenizer at {path}")
            self.console.print(f"training a {self.config.vocab_size}-token byte-level BPE on {self.config.data}")
            train_tokenizer(self.config.data, self.config.vocab_size, path)
        return AutoTokenizer.from_pretrained(str(path))

    def _tokens(self, data: str, name: str) -> PackedTokens:
        return tokenize(data, self.tokenizer, self.out / f"{name}-tokens.npz", self.config.seq_len, self.config.seed)

    def _model(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = dict(self.config.model)
        kind = fields.pop("model_type", None)
        if kind is None:
            raise BadInput("model.model_type is missing: name a transformers architecture, such as qwen3_moe")
        config = AutoConfig.for_model(
            kind,
            **{"vocab_size": len(self.tokenizer), "eos_token_id": self.tokenizer.eos_token_id, "bos_token_id": None, **fields},
        )
        model = AutoModelForCausalLM.from_config(config, experts_implementation=self.config.experts_implementation)
        if self.config.attention == "auto":
            short = self.config.device == "cpu" and self.config.seq_len <= attention.LONGEST
            if short and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation(attention.install())
        else:
            model.set_attn_implementation(self.config.attention)
        return model

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": self.config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=self.config.betas, fused=True)

    def loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Cross-entropy in nats per token, the balance losses by name, and the load [L, E] (None when dense)."""
        rows = rows.to(self.config.device)
        bfloat16 = self.config.dtype == "bfloat16"
        with torch.autocast(self.config.device, torch.bfloat16, enabled=bfloat16):
            if self.head:
                decoder, head = self.head
                hidden = decoder(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
                hidden_TD = hidden.flatten(0, 1).to(torch.bfloat16 if bfloat16 else hidden.dtype)
                cross_entropy = linear_cross_entropy(hidden_TD, head.weight, rows[:, 1:].flatten())
            else:
                logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
                cross_entropy = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        calls = self.tap.take()
        if not calls:
            return cross_entropy, {}, None
        losses, load_LE = balance_losses(calls)
        return cross_entropy, losses, load_LE

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; its data, rate and result depend on (config, step) and the weights alone."""
        config = self.config
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, load = 0.0, None
        parts: dict[str, float] = {}
        for micro in range(config.accumulate):
            first = (step * config.accumulate + micro) * config.batch_size
            cross_entropy, losses, load_LE = self.loss(self.train_data.rows(first, config.batch_size))
            objective = cross_entropy + sum(config.balance[name] * losses[name] for name in config.balance if losses)
            (objective / config.accumulate).backward()
            total += cross_entropy.item() / config.accumulate
            for name, value in losses.items():
                parts[name] = parts.get(name, 0.0) + value.item() / config.accumulate
            if load_LE is not None:
                load = load_LE.detach() + (0 if load is None else load)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise BadInput(f"step {step}: loss {total}, gradient norm {norm}: training diverged; lower lr or raise warmup")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {"step": step, "loss": total, "lr": rate, "grad_norm": norm, **parts}
        if load is not None:
            load = load / config.accumulate
            record["max_vio"] = [round(v, 4) for v in (load.max(1).values * load.shape[1] - 1).tolist()]
        return record

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy (nats per token) over the first eval_tokens of the validation documents."""
        assert self.valid_data is not None
        self.model.eval()
        count = min(self.valid_data.rows_per_epoch, max(1, self.config.eval_tokens // self.config.seq_len))
        losses = [self.loss(self.valid_data.rows(i, 1))[0].item() for i in range(count)]
        self.model.train()
        return sum(losses) / len(losses)

    def run(self) -> Path:
        config, folder = self.config, self.out / "checkpoints"
        start, spent = 0, 0.0
        newest = checkpoint.latest(folder)
        if newest:
            state = checkpoint.load(newest, self.model, self.optimizer)
            start, spent = state["step"], state.get("seconds", 0.0)
            self.console.print(f"resuming from {newest} at step {start}")
        (self.out / "config.json").write_text(config.model_dump_json(indent=1))
        log = (self.out / "log.jsonl").open("a")
        began = time.monotonic()
        board = _board(self.out)
        self.model.train()
        with self._progress() as progress:
            task = progress.add_task("training", total=config.steps, completed=start, status="")
            for step in range(start, config.steps):
                tick = time.monotonic()
                record = self.step(step)
                tokens = config.batch_size * config.accumulate * config.seq_len
                record["tokens_per_second"] = round(tokens / (time.monotonic() - tick))
                done = step + 1
                if self.valid_data and (done % config.eval_every == 0 or done == config.steps):
                    record["valid_loss"] = self.evaluate()
                record["seconds"] = round(spent + time.monotonic() - began, 1)
                if step % config.log_every == 0 or "valid_loss" in record:
                    print(json.dumps(record), file=log, flush=True)
                    for key, value in record.items():
                        if isinstance(value, float | int):
                            board.add_scalar(key, value, step)
                progress.update(task, advance=1, status=_status(record))
                if done % config.save_every == 0 or done == config.steps:
                    checkpoint.save(folder, done, self.model, self.optimizer, {"seconds": record["seconds"]})
        log.close()
        return self.export()

    def export(self) -> Path:
        """Write `out/final` in the training dtype: config, weights, tokenizer; stock transformers loads it."""
        final = self.out / "final"
        model = self.model.to(getattr(torch, self.config.dtype))
        model.save_pretrained(final)
        self.tokenizer.save_pretrained(final)
        self.console.print(f"wrote {final}")
        return final

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=self.console,
        )  # fmt: skip


def _status(record: dict[str, Any]) -> str:
    text = f"loss {record['loss']:.3f}  {record['tokens_per_second']} tokens/s"
    if "max_vio" in record:
        text += "  MaxVio per layer " + " ".join(f"{v:.2f}" for v in record["max_vio"])
    return text + (f"  valid {record['valid_loss']:.3f}" if "valid_loss" in record else "")


def _board(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return _NoBoard()
    return SummaryWriter(str(out / "tensorboard"))


class _NoBoard:
    """Stands in when the tensorboard extra is not installed."""

    def add_scalar(self, *args: Any) -> None: ...
