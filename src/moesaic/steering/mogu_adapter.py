"""MoGU's adapter: a safe and a usable LoRA on every o_proj, and two gates per token that mix them. Training, saving, loading.

D width of o_proj's input, O of its output, r rank, B rows, N tokens. Gates are a (safe) and b (usable), each a sigmoid of its
own: they need not sum to 1.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing

KEY = "moesaic_mogu"
HIDDEN = 512
LEAST = 1e-3
"""A loss that stands below the line of a ratio is clamped here: the ratio explodes near 0."""

Kind = Literal["safe", "usable"]
Projection = tuple[str, int, int]
"""Name, inputs and outputs."""


class Lora(nn.Module):
    """scale * B A dropout(h), zero at first."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs).normal_(std=inputs**-0.5))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * (self.dropout(h) @ self.down.to(h).T @ self.up.to(h).T)


class Mix(nn.Module):
    """One layer: two LoRAs and the gates, D -> 512 -> D -> 1 without a bias in the first (the card lists no activations)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.safe, self.usable = (Lora(inputs, outputs, rank, alpha, dropout) for _ in range(2))
        self.gate_safe, self.gate_usable = (
            nn.Sequential(nn.Linear(inputs, HIDDEN, bias=False), nn.Linear(HIDDEN, inputs), nn.Linear(inputs, 1))
            for _ in range(2)
        )

    def gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """a and b, [..., 1], from o_proj's input."""
        h = h.to(next(self.gate_safe.parameters()).dtype)
        return torch.sigmoid(self.gate_safe(h)), torch.sigmoid(self.gate_usable(h))


class MoguAdapter(nn.Module):
    """Beside a model that stays as it is: `attached(model)` mixes inside the block only.

    o_proj(h) becomes (a + b) o_proj(h) + a LoRA_safe(h) + b LoRA_usable(h), the LoRAs with their scale alpha / r = 2 inside:
    a times the safe variant plus b times the usable one, also where a + b is not 1.
    """

    def __init__(
        self, model: nn.Module | Sequence[Projection], rank: int = 8, alpha: float = 16, dropout: float = 0.05
    ) -> None:
        super().__init__()
        found = model
        if isinstance(found, nn.Module):
            found = [(name, p.in_features, p.out_features) for name, p in projections(found)]
        self.names, self.options = [name for name, _, _ in found], {"rank": rank, "alpha": alpha, "dropout": dropout}
        self.layers = nn.ModuleList(Mix(inputs, outputs, rank, alpha, dropout) for _, inputs, outputs in found)
        self._fixed: tuple[float, float] | None = None
        self._seen: list[tuple[Tensor, Tensor]] | None = None

    @contextmanager
    def gated(self, a: float, b: float) -> Iterator[None]:
        """Inside the block these numbers stand for the gates: (1, 0) is the safe variant, (0, 1) the usable one."""
        self._fixed = a, b
        try:
            yield
        finally:
            self._fixed = None

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Inside the block the gates a and b of every pass, [B, N, 1], layer by layer, are added to the list."""
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def check(self, model: nn.Module) -> list[Any]:
        """The model's projections. Raises BadInput where the adapter is for another model."""
        found = projections(model)
        mixes: list[Any] = list(self.layers)
        sizes = [(layer.safe.down.shape[1], layer.safe.up.shape[0]) for layer in mixes]
        if [name for name, _ in found] != self.names or [(p.in_features, p.out_features) for _, p in found] != sizes:
            raise BadInput(f"mogu: the adapter is for {len(self.names)} projections of another model")
        return [p for _, p in found]

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[MoguAdapter]:
        """Inside the block the model's calls in this thread are the mixture's."""
        own = threading.get_ident()
        found = self.check(model)
        handles = [p.register_forward_hook(self._hook(layer, own)) for p, layer in zip(found, self.layers, strict=True)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Any, own: int) -> Callable[..., Tensor | None]:
        def mix(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            if threading.get_ident() != own:
                return None
            h = args[0]
            if self._fixed is None:
                a, b = layer.gates(h)
                if self._seen is not None:
                    self._seen.append((a, b))
            else:
                a, b = (torch.full((), value) for value in self._fixed)
            a, b = a.to(out), b.to(out)
            return (a + b) * out + a * layer.safe(h) + b * layer.usable(h)

        return mix

    def write(self, path: str | Path) -> Path:
        header = {"names": self.names, **self.options}
        with replacing(path) as scratch:
            save_file({n: v.detach().contiguous() for n, v in self.state_dict().items()}, scratch, {KEY: json.dumps(header)})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> MoguAdapter:
        """Raises BadInput for a file that is none."""
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            down, up = ([tensors[f"layers.{i}.safe.{part}"] for i in range(len(header["names"]))] for part in ("down", "up"))
            sizes = [(name, a.shape[1], b.shape[0]) for name, a, b in zip(header.pop("names"), down, up, strict=True)]
            made = cls(sizes, **header)
            made.load_state_dict(tensors)
            return made.eval()
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(f"{path}: no MoGU adapter ({error})") from error


def projections(model: nn.Module) -> list[tuple[str, Any]]:
    """The attention output projections, by name. Raises BadInput where the model has none called o_proj."""
    found = [(name, m) for name, m in model.named_modules() if name.endswith("o_proj") and isinstance(m, nn.Linear)]
    if not found:
        raise BadInput("mogu: this model has no linear layer named o_proj")
    return found


Row = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""An instruction, an affirmative answer, a rejecting answer, as token ids."""


def answer_loss(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Mean cross-entropy of the answer's tokens."""
    device = model.get_input_embeddings().weight.device
    given = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    logits_AV = model(input_ids=given, use_cache=False).logits[0, len(prompt) - 1 :]
    return nn.functional.cross_entropy(logits_AV.float(), torch.tensor(list(answer), device=device))


def train_lora(
    model: Any, adapter: MoguAdapter, kind: Kind, rows: Sequence[Row], *, epochs: int = 10, lr: float = 5e-5, batch: int = 8,
    seed: int = 0,
) -> list[float]:  # fmt: skip
    """Stage 1. "usable" on risky instructions lowers L_affirm / L_reject, "safe" on harmless ones L_reject / L_affirm; AdamW.
    Returns the mean ratio of each batch."""
    learn = [p for layer in adapter.layers for p in getattr(layer, kind).parameters()]
    optimiser = torch.optim.AdamW(learn, lr=lr)
    history = []
    adapter.train()
    with _learning(model, adapter, learn), adapter.gated(float(kind == "safe"), float(kind == "usable")):
        for at in _batches(rows, epochs, batch, seed):
            ratios = []
            for prompt, affirm, reject in at:
                good, bad = (affirm, reject) if kind == "usable" else (reject, affirm)
                ratios.append(answer_loss(model, prompt, good) / answer_loss(model, prompt, bad).clamp(min=LEAST))
            loss = torch.stack(ratios).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            history.append(float(loss.detach()))
    adapter.eval()
    return history


def train_gates(
    model: Any, adapter: MoguAdapter, harmless: Sequence[Row], risky: Sequence[Row], *, epochs: int = 10, lr: float = 5e-4,
    accumulate: int = 16, weight: float = 2.0, seed: int = 0,
) -> list[float]:  # fmt: skip
    """Stage 2, gates only: LM loss plus `weight` times the squared distance of every a and b from 0 and 1 (harmless) or 1 and 0
    (risky). A harmless instruction's answer is the affirmative one, a risky one's the rejecting one. Returns the mean loss of
    each step."""
    mixes: list[Any] = list(adapter.layers)
    learn = [p for mix in mixes for gate in (mix.gate_safe, mix.gate_usable) for p in gate.parameters()]
    optimiser = torch.optim.AdamW(learn, lr=lr)
    rows = [(row, False) for row in harmless] + [(row, True) for row in risky]
    history = []
    with _learning(model, adapter, learn), adapter.watched() as seen:
        for at in _batches(rows, epochs, accumulate, seed):
            total = 0.0
            for (prompt, affirm, reject), is_risky in at:
                seen.clear()
                loss = answer_loss(model, prompt, reject if is_risky else affirm)
                a, b = (torch.stack([gates[i].mean((0, 2)) for gates in seen]) for i in (0, 1))
                target = float(is_risky)
                loss = loss + weight * ((a - target).square().mean() + (b - (1 - target)).square().mean())
                (loss / len(at)).backward()
                total += float(loss.detach()) / len(at)
            optimiser.step()
            optimiser.zero_grad()
            history.append(total)
    return history


@torch.no_grad()
def measure(model: Any, adapter: MoguAdapter, harmless: Sequence[Row], risky: Sequence[Row]) -> dict[str, float]:
    """On rows that taught nothing: the mean gates of each kind, how well a tells them apart (AUC), and the loss of affirmative
    answers to harmless prompts and of rejections of risky ones, without and with the mixture."""
    found: dict[str, float] = {}
    kinds = (("harmless", "loss", harmless, 1), ("risky", "reject", risky, 2))
    for _, word, rows, answer in kinds:
        found[f"{word}_base"] = sum(float(answer_loss(model, row[0], row[answer])) for row in rows) / len(rows)
    a_of: dict[str, Tensor] = {}
    with adapter.attached(model), adapter.watched() as seen:
        for name, word, rows, answer in kinds:
            losses, gates = [], []
            for row in rows:
                seen.clear()
                losses.append(float(answer_loss(model, row[0], row[answer])))
                gates.append(torch.tensor([[float(part.mean()) for part in pair] for pair in seen]).mean(0))
            a_of[name], b = torch.stack(gates).unbind(1)
            found |= {f"{word}_mixed": sum(losses) / len(losses), f"a_{name}": float(a_of[name].mean())}
            found[f"b_{name}"] = float(b.mean())
    apart = a_of["risky"][:, None] - a_of["harmless"][None]
    return {**found, "auc": float((apart > 0).double().mean() + (apart == 0).double().mean() / 2)}


@contextmanager
def _learning(model: Any, adapter: MoguAdapter, learn: Sequence[nn.Parameter]) -> Iterator[None]:
    """The adapter attached, with gradients for `learn` alone; what had gradients before has them again afterwards."""
    everything = [*model.parameters(), *adapter.parameters()]
    before, wanted = [p.requires_grad for p in everything], {id(p) for p in learn}
    for parameter in everything:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad(), adapter.attached(model):
            yield
    finally:
        for parameter, own in zip(everything, before, strict=True):
            parameter.requires_grad_(own)


def _batches(rows: Sequence[Any], epochs: int, size: int, seed: int) -> Iterator[list[Any]]:
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for at in torch.randperm(len(rows), generator=random).split(size):
            yield [rows[i] for i in at.tolist()]
