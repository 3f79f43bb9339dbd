"""The training loop of a causal language model: one config in, one checkpoint that stock transformers loads out."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.processes import sum_over_processes
from moesaic.models.language.loss import IGNORED, hide
from moesaic.training import build, checkpoint, divergence, parallel
from moesaic.training.balance import balance_of, load_facts
from moesaic.training.config import TrainConfig, learning_rate
from moesaic.training.consistency import two_forwards
from moesaic.training.loss import linear_cross_entropy, plain_head
from moesaic.training.phases import Phases
from moesaic.training.processes import Processes
from moesaic.training.progress import Display, RunLog, Silence
from moesaic.training.signals import stop_signals


class Interrupted(Exception):
    """Ctrl-C, or a termination signal, after which a checkpoint was written; `path` is that checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(f"interrupted after step {step}: saved {path}")
        self.path, self.step = path, step


class Trainer:
    """Runs a TrainConfig. `run()` resumes from the newest checkpoint in `out` and ends with `out/final`."""

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        self.config, self.console = config, console or Console(stderr=True)
        self.processes, self.device = Processes.join(config.device)
        if not self.processes.first:
            self.console = Console(quiet=True)
        self._check_batch()
        self.out = Path(config.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"out: cannot make the folder {self.out} ({error.strerror})") from error
        if config.threads:
            torch.set_num_threads(config.threads)
        build.keep_freed_memory()
        torch.manual_seed(config.seed)
        self._read()
        self.model = build.build_model(config, self.tokenizer, self.device)
        self.masked = getattr(self.model.config, "causal", True) is False
        if self.masked and config.consistency:
            raise BadInput("consistency: two forwards of the next token; a model with causal: false guesses hidden ones")
        self.head = None if self.masked else plain_head(self.model)
        self.balance = balance_of(self.model, config.balance, config.balance_scope)
        self.phases = Phases(config, self.model)
        if config.spawn and config.parallel == "fsdp" and self.processes.world > 1:
            raise BadInput("spawn: copies whole experts, which parallel: fsdp has in pieces; use parallel: ddp")
        self.objective = parallel.spread(self.model, self.local_loss, config.parallel, self.processes, self.device)
        self.optimizer = build.build_optimizer(config, self.model)
        torch.manual_seed(config.seed + 1_000_003 * self.processes.rank)
        self.watch = divergence.Watch(config.divergence) if config.divergence else None
        self.resumed_from: Path | None = None
        self.last: dict[str, Any] = {}

    def _check_batch(self) -> None:
        """Every process takes the same number of sequences. Raises BadInput."""
        if self.config.batch_size % self.processes.world:
            raise BadInput(f"batch_size: {self.config.batch_size} does not divide among {self.processes.world} processes")

    def _read(self) -> None:
        """Tokenizer and data; the first process makes them, the others read what it made."""
        if not self.processes.first:
            self.processes.wait()
        config = self.config
        self.tokenizer = build.build_tokenizer(config, self.out, self.console.print)
        self.train_data = build.build_data(config, "data", self.tokenizer, self.out)
        self.valid_data = build.build_data(config, "valid", self.tokenizer, self.out) if config.valid else None
        if self.processes.first:
            self.processes.wait()

    def loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """`local_loss`; where there are several processes, through what averages their gradients."""
        return self.objective(rows)

    def local_loss(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Cross-entropy in nats per token, the balance losses by name, and each layer's load [E] (none when dense).

        With `consistency` a training batch goes through twice: the cross-entropy is the mean of both, the agreement is one
        loss more, and the balance losses are those of the second.
        """
        rows = rows.to(self.device)
        inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
        bfloat16 = self.config.dtype == "bfloat16"
        agreement = None
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=bfloat16):
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
        self.phases.before(step)
        own = config.batch_size // self.processes.world
        total, loads = 0.0, []
        parts: dict[str, float] = {}
        for micro in range(config.accumulate):
            first = (step * config.accumulate + micro) * config.batch_size + self.processes.rank * own
            with parallel.gathering(self.objective, last=micro == config.accumulate - 1):
                cross_entropy, losses, load = self.loss(self.train_data.rows(first, own))
                objective = cross_entropy
                for name, value in losses.items():
                    objective = objective + self._coefficient(name) * value
                    parts[name] = parts.get(name, 0.0) + value.item() / config.accumulate
                (objective / config.accumulate).backward()
            total += cross_entropy.item() / config.accumulate
            loads.append(load)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        total_norm = parallel.whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        norm = total_norm.item()
        total, *values = self.processes.mean([total, *parts.values()], self.device)
        parts = dict(zip(parts, values, strict=True))
        self._check(step, total, norm, parts)  # before clipping, which would spread what is not finite over all gradients
        nn.utils.clip_grads_with_norm_(parameters, config.clip, total_norm)
        self.optimizer.step()
        self.balance.after_step()
        parallel.agree_on_buffers(self.model, self.processes)
        self.optimizer.zero_grad(set_to_none=True)
        record: dict[str, Any] = {"step": step, "loss": total, "lr": rate, "grad_norm": norm, **parts}
        if loads[0]:
            record |= load_facts(self._shares(loads))
        return record

    def _coefficient(self, name: str) -> float:
        """Of one of the losses of the last forward; a layer's own ones (deepseekmoe, maestro) are known only after it."""
        return (
            self.config.consistency / 2 if name == "consistency" else self.balance.coefficients[name]
        )  # the paper's sum, halved

    def _shares(self, loads: list[list[Tensor]]) -> list[Tensor]:
        """Each layer's load, averaged over micro-steps and processes."""
        shares = [torch.stack(layer).mean(0) for layer in zip(*loads, strict=True)]
        return [sum_over_processes(share_E) / self.processes.world for share_E in shares]

    def _check(self, step: int, loss: float, norm: float, parts: dict[str, float]) -> None:
        """Raises BadInput before a step that would spoil the weights, and for a run that has diverged."""
        finite = all(map(math.isfinite, (loss, norm, *parts.values())))
        if finite:
            why = self.watch.told(step, loss, norm) if self.watch else ""
            if not why:
                return
        else:
            lost = [name for name, value in parts.items() if not math.isfinite(value)]
            why = f"loss {loss}, gradient norm {norm}" + (f", balance loss {', '.join(lost)}" if lost else "")
            where = self._culprit(step)
            why += f"; {where}" if where else ""
        saved = checkpoint.newest_first(self.out / "checkpoints")
        kept = f"; {saved[0]} is from before" if saved else ""
        raise BadInput(f"step {step}: {why}: training diverged{kept}; lower lr, or raise warmup")

    def _culprit(self, step: int) -> str:
        """The first tensor that is not finite: a weight, a module's output on this step's first rows, or a gradient."""
        rows = self.train_data.rows(step * self.config.accumulate * self.config.batch_size, self.config.batch_size)
        found = divergence.bad_parameter(self.model)
        if not found and self.processes.world == 1:  # alone, one process cannot run a sharded forward
            found = divergence.bad_output(self.model, lambda: self.local_loss(rows))
        return found or divergence.bad_gradient(self.model)

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy (nats per token) over eval_tokens of the validation documents."""
        assert self.valid_data is not None
        self.model.eval()
        count = min(self.valid_data.rows_per_epoch, max(1, self.config.eval_tokens // self.config.seq_len))
        total, world = 0.0, self.processes.world
        for i in range(self.processes.rank, count + -count % world, world):  # all take part in every forward
            nats = self.loss(self.valid_data.rows(min(i, count - 1), 1))[0].item()
            total += nats if i < count else 0.0
        self.model.train()
        return self.processes.sum([total], self.device)[0] / count

    def run(self) -> Path:
        """Train to the last step. Raises Interrupted once a signal came and the state is safe on disk."""
        config, folder = self.config, self.out / "checkpoints"
        start, spent = self._resume(folder)
        log: RunLog | Silence = Silence()
        if self.processes.first:
            (self.out / "config.json").write_text(config.model_dump_json(indent=1))
            log = RunLog(self.out, start)
        began = time.monotonic()
        self.model.train()
        try:
            with Display(self.console, config.steps, start, config.log_every) as display, stop_signals() as came:
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
                    stop = self.processes.sum([float(len(came))], self.device)[0] > 0
                    if done == config.steps or stop or (done % config.save_every == 0 and not self._in_doubt):
                        saved = self._save(done, record["seconds"])
                        if stop and done < config.steps:
                            raise Interrupted(saved, step)
        finally:
            log.close()
        return self.export()

    @property
    def _in_doubt(self) -> bool:
        """Whether the loss stands where it should not: then the last good checkpoint stays the newest."""
        return self.watch is not None and self.watch.in_doubt

    def _save(self, done: int, seconds: float) -> Path:
        state = {"seconds": seconds, "data": self.train_data.fingerprint, "world": self.processes.world}
        if self.watch is not None:
            state["watch"] = self.watch.state()
        random = parallel.random_states(self.device, self.processes)
        return checkpoint.save(self.out / "checkpoints", done, self.model, self.optimizer, state, random, self.processes)

    def _resume(self, folder: Path) -> tuple[int, float]:
        """Step to go on from and seconds spent so far; a broken checkpoint is passed over for the one before it."""
        found = checkpoint.newest_first(folder)
        for path in found:
            try:
                state = checkpoint.load(path, self.model, self.optimizer, self.processes)
            except checkpoint.Broken as error:
                self.console.print(f"[yellow]{error}; passing over it[/yellow]")
                continue
            if state["step"] > self.config.steps:
                raise BadInput(f"steps: {self.config.steps} is behind {path}; raise it, or give another out")
            if state.get("data", self.train_data.fingerprint) != self.train_data.fingerprint:
                self.console.print("[yellow]the data changed since this checkpoint: the run goes on, but not exactly[/yellow]")
            if state.get("world", 1) != self.processes.world:
                self.console.print(
                    f"[yellow]{state.get('world', 1)} processes made this checkpoint: sums round otherwise[/yellow]"
                )
            if self.watch is not None:
                self.watch.restore(state.get("watch", {}))
            self.phases.resume(state["step"])
            self.resumed_from = path
            self.console.print(f"resuming from {path} at step {state['step']}")
            return state["step"], state.get("seconds", 0.0)
        if found:
            raise BadInput(f"{folder}: no checkpoint there can be read; delete the folder to start again")
        return 0, 0.0

    def export(self) -> Path:
        """Write `out/final` in the training dtype: config, weights, tokenizer; stock transformers loads it."""
        final, scratch = self.out / "final", self.out / ".final.partial"
        self.balance.close()
        self.phases.close()
        model = self.model
        if self.processes.world > 1:
            weights = checkpoint.weights_of(self.model)
            model = build.build_model(self.config, self.tokenizer, "cpu") if self.processes.first else None
        if self.processes.first:
            if self.processes.world > 1:
                checkpoint.put_weights(model, weights)
            shutil.rmtree(scratch, ignore_errors=True)
            model.to(getattr(torch, self.config.dtype)).save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(scratch, final)
            self.console.print(f"wrote {final}")
        self.processes.wait()
        return final
