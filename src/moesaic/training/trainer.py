"""The training loop of a causal language model: one config in, one checkpoint that stock transformers loads out."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.models.language.loss import IGNORED, hide
from moesaic.training import build, checkpoint
from moesaic.training.balance import balance_of, load_facts
from moesaic.training.config import TrainConfig, learning_rate
from moesaic.training.consistency import two_forwards
from moesaic.training.loss import linear_cross_entropy, plain_head
from moesaic.training.progress import Display, RunLog


class Interrupted(Exception):
    """Ctrl-C, or a termination signal, after which a checkpoint was written; `path` is that checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}: saved {path}")
        self.path, self.step = path, step


class Trainer:
    """Runs a TrainConfig. `run()` resumes from the newest checkpoint in `out` and ends with `out/final`."""

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        self.config, self.console = config, console or Console(stderr=True)
        self.out = Path(config.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"out: cannot make the folder {self.out} ({error.strerror})") from error
        if config.threads:
            torch.set_num_threads(config.threads)
        build.keep_freed_memory()
        torch.manual_seed(config.seed)
        self.tokenizer = build.build_tokenizer(config, self.out, self.console.print)
        self.train_data = build.build_data(config, "data", self.tokenizer, self.out)
        self.valid_data = build.build_data(config, "valid", self.tokenizer, self.out) if config.valid else None
        self.model = build.build_model(config, self.tokenizer)
        self.masked = getattr(self.model.config, "causal", True) is False
        self.head = None if self.masked else plain_head(self.model)
        self.balance = balance_of(self.model, config.balance, config.balance_scope)
        self.optimizer = build.build_optimizer(config, self.model)
        self.resumed_from: Path | None = None
        self.last: dict[str, Any] = {}

    def loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Cross-entropy in nats per token, the balance losses by name, and each layer's load [E] (none when dense).

        With `consistency` a training batch goes through twice: the cross-entropy is the mean of both, the agreement is one
        loss more, and the balance losses are those of the second.
        """
        rows = rows.to(self.config.device)
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        bfloat16 = self.config.dtype == "bfloat16"
        agreement = None
        with torch.autocast(torch.device(self.config.device).type, torch.bfloat16, enabled=bfloat16):
            if self.config.consistency and self.model.training:
                both, agreement = two_forwards(lambda: self._cross_entropy(inputs, targets), alpha=0.0)
                cross_entropy = both / 2
            elif self.masked:
                cross_entropy = self._hidden_tokens(inputs)
            elif self.head:
                decoder, head = self.head
                hidden_TD = decoder(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
                hidden_TD = hidden_TD.to(torch.bfloat16) if bfloat16 else hidden_TD
                cross_entropy = linear_cross_entropy(hidden_TD, head.weight, targets)
            else:
                cross_entropy, _ = self._cross_entropy(inputs, targets)
        losses, load = self.balance.losses(len(rows), self.model.training), self.balance.load()
        self.balance.clear()
        if agreement is not None:
            losses["consistency"] = agreement
        return cross_entropy, losses, load

    def _cross_entropy(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of a forward that keeps its logits, and those."""
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets), logits

    def _hidden_tokens(self, inputs: Tensor) -> Tensor:
        """Mean cross-entropy of a masked model on the tokens that are hidden at its step."""
        hidden, labels = hide(inputs, inputs, None, int(self.model.model.step), self.model.config.mask_token_id)
        logits = self.model(input_ids=hidden, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; its data, rate and result depend on (config, step) and the weights alone."""
        config = self.config
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, loads = 0.0, []
        parts: dict[str, float] = {}
        coefficients = {**self.balance.coefficients, "consistency": config.consistency / 2}  # the paper's sum, halved
        for micro in range(config.accumulate):
            first = (step * config.accumulate + micro) * config.batch_size
            cross_entropy, losses, load = self.loss(self.train_data.rows(first, config.batch_size))
            objective = cross_entropy
            for name, value in losses.items():
                objective = objective + coefficients[name] * value
                parts[name] = parts.get(name, 0.0) + value.item() / config.accumulate
            (objective / config.accumulate).backward()
            total += cross_entropy.item() / config.accumulate
            loads.append(load)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        if not math.isfinite(total) or not math.isfinite(norm):
            raise BadInput(self._diverged(step, total, norm))
        self.optimizer.step()
        self.balance.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {"step": step, "loss": total, "lr": rate, "grad_norm": norm, **parts}
        if loads[0]:
            shares = [torch.stack(layer).mean(0) for layer in zip(*loads, strict=True)]
            record |= load_facts(shares)
        return record

    def _diverged(self, step: int, loss: float, norm: float) -> str:
        saved = checkpoint.newest_first(self.out / "checkpoints")
        kept = f"; {saved[0]} is from before" if saved else ""
        return f"step {step}: loss {loss}, gradient norm {norm}: training diverged{kept}; lower lr, or raise warmup"

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy (nats per token) over eval_tokens of the validation documents."""
        assert self.valid_data is not None
        self.model.eval()
        count = min(self.valid_data.rows_per_epoch, max(1, self.config.eval_tokens // self.config.seq_len))
        losses = [self.loss(self.valid_data.rows(i, 1))[0].item() for i in range(count)]
        self.model.train()
        return sum(losses) / len(losses)

    def run(self) -> Path:
        """Train to the last step. Raises Interrupted once a signal came and the state is safe on disk."""
        config, folder = self.config, self.out / "checkpoints"
        start, spent = self._resume(folder)
        (self.out / "config.json").write_text(config.model_dump_json(indent=1))
        log = RunLog(self.out, start)
        began = time.monotonic()
        self.model.train()
        try:
            with Display(self.console, config.steps, start, config.log_every) as display, _signals() as stop:
                for step in range(start, config.steps):
                    tick = time.monotonic()
                    record = self.last = self.step(step)
                    tokens = config.batch_size * config.accumulate * config.seq_len
                    record["tokens_per_second"] = round(tokens / max(time.monotonic() - tick, 1e-9))
                    done = step + 1
                    if self.valid_data and (done % config.eval_every == 0 or done == config.steps):
                        record["valid_loss"] = self.evaluate()
                    record["seconds"] = round(spent + time.monotonic() - began, 1)
                    if step % config.log_every == 0 or "valid_loss" in record:
                        log.write(record)
                    display.update(record)
                    if done % config.save_every == 0 or done == config.steps or stop:
                        state = {"seconds": record["seconds"], "data": self.train_data.fingerprint}
                        saved = checkpoint.save(folder, done, self.model, self.optimizer, state)
                        if stop and done < config.steps:
                            raise Interrupted(saved, step)
        finally:
            log.close()
        return self.export()

    def _resume(self, folder: Path) -> tuple[int, float]:
        """Step to go on from and seconds spent so far; a broken checkpoint is passed over for the one before it."""
        found = checkpoint.newest_first(folder)
        for path in found:
            try:
                state = checkpoint.load(path, self.model, self.optimizer)
            except checkpoint.Broken as error:
                self.console.print(f"[yellow]{error}; passing over it[/yellow]")
                continue
            if state["step"] > self.config.steps:
                raise BadInput(f"steps: {self.config.steps} is behind {path}; raise it, or give another out")
            if state.get("data", self.train_data.fingerprint) != self.train_data.fingerprint:
                self.console.print("[yellow]the data changed since this checkpoint: the run goes on, but not exactly[/yellow]")
            self.resumed_from = path
            self.console.print(f"resuming from {path} at step {state['step']}")
            return state["step"], state.get("seconds", 0.0)
        if found:
            raise BadInput(f"{folder}: no checkpoint there can be read; delete the folder to start again")
        return 0, 0.0

    def export(self) -> Path:
        """Write `out/final` in the training dtype: config, weights, tokenizer; stock transformers loads it."""
        final, scratch = self.out / "final", self.out / ".final.partial"
        shutil.rmtree(scratch, ignore_errors=True)
        self.balance.close()
        self.model.to(getattr(torch, self.config.dtype)).save_pretrained(scratch)
        self.tokenizer.save_pretrained(scratch)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(scratch, final)
        self.console.print(f"wrote {final}")
        return final


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that fills when SIGINT or SIGTERM comes: the step in progress ends first. A second signal acts at once."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for one in before:
            signal.signal(one, before[one])

    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in before:
        signal.signal(one, note)
    try:
        yield came
    finally:
        for one in before:
            signal.signal(one, before[one])
