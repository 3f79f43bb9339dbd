"""The second head of an SDM network: logits of "verification says wrong" beside a model's own, and what a unit of text shows.

N tokens of a unit, V vocabulary, D width of the model. z_pos are the model's logits, z_neg = z_pos + W h + b, h the last
hidden state: W = b = 0 gives both halves the same mass. The model's own weights stay as they are: its text is what it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing
from moesaic.steering.sdm_model import SOFTMAX_Q, fit, sdm_loss

KEY = "moesaic_sdm_head"
WRONG, RIGHT = 0, 1
NAMES = ("wrong", "right")

Unit = tuple[Sequence[int], Sequence[int], int]
"""What stands before, the unit's tokens, and whether it is RIGHT or WRONG."""


@dataclass
class Head:
    """W [V, D], b [V], and what features are shifted by and multiplied with, [D + 1]."""

    weight_VD: Tensor
    bias_V: Tensor
    shift_F: Tensor
    scale_F: Tensor

    @classmethod
    def fresh(cls, model: Any) -> Head:
        """W = b = 0, for a model's vocabulary and width."""
        size, width = sizes(model)
        return cls(torch.zeros(size, width), torch.zeros(size), torch.zeros(width + 1), torch.ones(width + 1))

    def check(self, model: Any) -> None:
        """Raises BadInput for a head of another model."""
        if tuple(self.weight_VD.shape) != sizes(model):
            raise BadInput(
                f"sdm_network: a head of {tuple(self.weight_VD.shape)}, the model's is {sizes(model)}: train it again"
            )

    def both(self, logits_NV: Tensor, h_ND: Tensor) -> Tensor:
        """z_neg and z_pos, [N, 2 V]."""
        return torch.cat([logits_NV + h_ND @ self.weight_VD.T + self.bias_V, logits_NV], -1)

    def odds(self, h_ND: Tensor, written_N: Tensor) -> Tensor:
        """log p(token, right) - log p(token, wrong) of each written token: z_pos - z_neg there, [N]."""
        return -(self.weight_VD[written_N] * h_ND).sum(-1) - self.bias_V[written_N]

    def features(self, h_ND: Tensor, written_N: Tensor, last_D: Tensor) -> Tensor:
        """[D + 1]: the state after the unit, and the mean log odds of its tokens."""
        whole_F = torch.cat([last_D, self.odds(h_ND, written_N).mean().view(1)])
        return (whole_F - self.shift_F) * self.scale_F

    def standardise(self, x_nF: Tensor) -> None:
        """Set shift and scale by unscaled features: the log odds alone then weigh as much as the state's D entries together."""
        weight_F = torch.ones(x_nF.shape[1])
        weight_F[-1] = (x_nF.shape[1] - 1) ** 0.5
        self.shift_F, self.scale_F = x_nF.mean(0), weight_F / x_nF.std(0).clamp(min=1e-6)

    def write(self, path: str | Path) -> Path:
        with replacing(path) as scratch:
            tensors = {"weight": self.weight_VD, "bias": self.bias_V, "shift": self.shift_F, "scale": self.scale_F}
            save_file({name: value.contiguous() for name, value in tensors.items()}, scratch, {KEY: json.dumps({"version": 1})})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Head:
        """Raises BadInput for a file that is none."""
        try:
            with safe_open(str(path), framework="pt") as file:
                if KEY not in (file.metadata() or {}):
                    raise ValueError("another kind of file")
                made = cls(*(file.get_tensor(name).float() for name in ("weight", "bias", "shift", "scale")))
            size, width = made.weight_VD.shape
            if [len(part) for part in (made.bias_V, made.shift_F, made.scale_F)] != [size, width + 1, width + 1]:
                raise ValueError("its tensors do not fit each other")
            return made
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise BadInput(f"{path}: no head of an SDM network ({error})") from error


def sizes(model: Any) -> tuple[int, int]:
    """V and D of a model."""
    return len(model.get_output_embeddings().weight), model.get_input_embeddings().embedding_dim


@torch.no_grad()
def read_unit(model: Any, before: Sequence[int], unit: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] and states [N, D] from which the unit's tokens are drawn, and the state after its last one [D]; float32.
    Raises BadInput where nothing stands before the unit, or the unit is empty."""
    if not before or not unit:
        raise BadInput("sdm_network: a unit needs a token, and a token before it")
    given = torch.tensor([[*before, *unit]], device=model.get_input_embeddings().weight.device)
    output = model(input_ids=given, use_cache=False, output_hidden_states=True)
    at = slice(len(before) - 1, -1)
    h_SD = output.hidden_states[-1][0].float().cpu()
    return output.logits[0, at].float().cpu(), h_SD[at], h_SD[-1]


def unit_features(model: Any, head: Head, before: Sequence[int], unit: Sequence[int]) -> Tensor:
    """What the verification layer reads of a unit, [D + 1]."""
    _, h_ND, last_D = read_unit(model, before, unit)
    return head.features(h_ND, torch.tensor(list(unit)), last_D)


def states(model: Any, units: Sequence[Unit]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each unit the states [N, D] that its tokens are drawn from, these tokens [N], and the state after them [D]. Raises
    BadInput for a model whose logits are no product of the last state and the head."""
    found = []
    for number, (before, unit, _) in enumerate(units):
        logits_NV, h_ND, last_D = read_unit(model, before, unit)
        if not number and not torch.allclose(positive(model, h_ND), logits_NV, rtol=1e-2, atol=1e-2 * float(logits_NV.std())):
            raise BadInput("sdm_network: this model scales or caps its logits after the head, which training cannot follow")
        found.append((h_ND, torch.tensor(list(unit)), last_D))
    return found


@torch.no_grad()
def positive(model: Any, h_ND: Tensor) -> Tensor:
    """z_pos [N, V] of last states, in float32."""
    out = model.get_output_embeddings()
    return out(h_ND.to(out.weight)).float().cpu()


def train_head(
    model: Any, units: Sequence[Unit], *, epochs: int = 4, lr: float = 1e-3, batch: int = 8, width: int = 64,
    verify_epochs: int = 20, verify_lr: float = 1e-3, seed: int = 0,
) -> tuple[Head, list[float]]:  # fmt: skip
    """W and b by the SDM loss on z_neg and z_pos side by side: a right unit's tokens are wanted in the positive half, a wrong
    one's in the negative one. The first epoch is softmax; then every unit has the q and d that a verification layer, fitted to
    the features of the epoch before, gives it. Adam. Returns the head and the mean loss of each epoch, to base (2 + q).

    Raises BadInput for less than 8 units of either kind."""
    label_n = torch.tensor([label for *_, label in units])
    for kind, name in enumerate(NAMES):
        if int((label_n == kind).sum()) < 8:
            raise BadInput(f"sdm_network: {int((label_n == kind).sum())} {name} units to train a head: give 8 at least")
    read = states(model, units)
    head = Head.fresh(model)
    learn = [head.weight_VD.requires_grad_(), head.bias_V.requires_grad_()]
    optimiser = torch.optim.Adam(learn, lr=lr)
    random = torch.Generator().manual_seed(seed)
    q_n, d_n = torch.full((len(units),), SOFTMAX_Q), torch.ones(len(units))
    history = []
    for epoch in range(epochs):
        if epoch:
            q_n, d_n = _verified(_seen(head, read), label_n, width, verify_epochs, verify_lr, seed)
        total = 0.0
        for at in torch.randperm(len(units), generator=random).split(batch):
            losses = []
            for i in at.tolist():
                h_ND, written_N, _ = read[i]
                logits_NV = positive(model, h_ND)
                wanted_N = written_N + (logits_NV.shape[1] if label_n[i] == RIGHT else 0)
                same_N = torch.ones(len(written_N))
                with torch.enable_grad():
                    losses.append(sdm_loss(head.both(logits_NV, h_ND), same_N * q_n[i], same_N * d_n[i], wanted_N))
            loss = torch.stack(losses).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(at) / len(units)
        history.append(total)
    head.weight_VD, head.bias_V = head.weight_VD.detach(), head.bias_V.detach()
    return head, history


@torch.no_grad()
def _seen(head: Head, read: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Standardised features of all units under a head in the making, [n, D + 1]."""
    now = Head(head.weight_VD, head.bias_V, torch.zeros_like(head.shift_F), torch.ones_like(head.scale_F))
    x_nF = torch.stack([now.features(*one) for one in read])
    now.standardise(x_nF)
    return (x_nF - now.shift_F) * now.scale_F


def _verified(x_nF: Tensor, label_n: Tensor, width: int, epochs: int, lr: float, seed: int) -> tuple[Tensor, Tensor]:
    """q and d of every unit: each kind's even ones are the support, where a unit leaves itself out; its odd ones say what is
    far."""
    rank_n = torch.zeros_like(label_n)
    for kind in (WRONG, RIGHT):
        rank_n[label_n == kind] = torch.arange(int((label_n == kind).sum()))
    even_n = rank_n % 2 == 0
    fitted = fit(
        x_nF[even_n], label_n[even_n], x_nF[~even_n], label_n[~even_n], 2, width=width, epochs=epochs, lr=lr, seed=seed
    )
    q_n, d_n = torch.empty(len(x_nF)), torch.empty(len(x_nF))
    _, q_n[~even_n], d_n[~even_n] = fitted.look(x_nF[~even_n])
    with torch.no_grad():
        q_n[even_n], nearest = fitted.support.look(fitted.support.h_nM, fitted.support.predicted_n, own=True)
    d_n[even_n] = fitted.distances.d(nearest)
    return q_n, d_n
