"""TGeo-KD: a controller learns, from the geometry of student, teacher and label, how far each sample trusts the teacher.

Shape legend: T samples (predicting positions), V classes or vocabulary, C entries of a distribution's short form, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.objective import Batch, Given, Objective
from moesaic.trace import corpus

ENOUGH = 1 << 16
"""Tokens over which the teacher's class means are taken."""


def geometric_state(s_TC: Tensor, t_TC: Tensor, g_TC: Tensor, mean_TC: Tensor) -> Tensor:
    """[T, 9C]: student S, teacher T, label G, the teacher's mean of the class M; then (M-S)^2, (G-S)^2, (T-S)^2, (T-G)^2,
    (M-G)^2, all 0 where the four agree."""
    pairs = ((mean_TC, s_TC), (g_TC, s_TC), (t_TC, s_TC), (t_TC, g_TC), (mean_TC, g_TC))
    return torch.cat([s_TC, t_TC, g_TC, mean_TC, *((a - b).square() for a, b in pairs)], -1)


class Controller(nn.Sequential):
    """9C -> 32 -> 16 -> 1, LeakyReLU, sigmoid: alpha [T], the weight of the teacher."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1), nn.Sigmoid()
        )

    def forward(self, state_TS: Tensor) -> Tensor:
        return super().forward(state_TS).squeeze(-1)


def fused_loss(student_TV: Tensor, teacher_TV: Tensor, label_T: Tensor, alpha_T: Tensor, tau: float) -> Tensor:
    """Mean of alpha tau^2 KL(T_tau || S_tau) + (1 - alpha) CE."""
    now_TV, want_TV = (student_TV / tau).log_softmax(-1), (teacher_TV / tau).log_softmax(-1)
    kl_T = (want_TV.exp() * (want_TV - now_TV)).sum(-1)
    return (alpha_T * tau**2 * kl_T + (1 - alpha_T) * cross_entropy(student_TV, label_T, reduction="none")).mean()


def outer_loss(
    alpha_T: Tensor, hidden_TD: Tensor, student_TV: Tensor, teacher_TV: Tensor, label_T: Tensor, tau: float, rate: float,
    valid_UD: Tensor, valid_UV: Tensor, valid_label_U: Tensor,
) -> Tensor:  # fmt: skip
    """CE on validation samples U after one step of the head W at `rate` down `fused_loss`; differentiable in alpha.

    The step's gradient is delta^T h / T with delta = alpha tau (S_tau - T_tau) + (1 - alpha) (S - G): linear in alpha, so the
    unrolled gradient needs no second derivatives, and W itself is never copied.
    """
    alpha_T1 = alpha_T.unsqueeze(-1)
    soft_TV = tau * ((student_TV / tau).softmax(-1) - (teacher_TV / tau).softmax(-1))
    hard_TV = student_TV.softmax(-1) - one_hot(label_T, student_TV.shape[-1])
    delta_TV = alpha_T1 * soft_TV + (1 - alpha_T1) * hard_TV
    stepped_UV = valid_UV - rate * (valid_UD @ hidden_TD.T) @ delta_TV / len(label_T)
    return cross_entropy(stepped_UV, valid_label_U)


@register("distill", "tgeo_kd", paper="2312.15112", card="surgery-and-steering.md#tgeo-kd", exact=False)
class TGeoKD(Objective):
    """alpha tau^2 KL(T || S) + (1 - alpha) CE per position, alpha by a controller that is learned on a text "valid".

    Before each student step the controller takes one of its own: down the CE on `valid` of a student whose head has made
    a step of `inner_lr` with these alphas. Adam, lr 0.1, weight decay 0.05, decoupled: as an L2 term it outweighs the small
    outer gradient, and alpha ends as one constant. The released code computes alpha without a
    gradient, so that its controller never learns; the paper is followed. Over a vocabulary a distribution is shown by the
    probabilities of the teacher's `top` tokens and of the label; the mean of a class, rank by rank, is over the training
    positions with that label. The bilevel step looks at `sample` positions and at the head alone.
    """

    texts = ("text", "valid")

    def __init__(self, tau: float = 1.5, top: int = 8, controller_lr: float = 0.1, inner_lr: float = 0.5, sample: int = 256):
        if tau <= 0 or top < 1 or controller_lr <= 0 or inner_lr <= 0 or sample < 1:
            raise BadInput(
                f"tau={tau}, top={top}, controller_lr={controller_lr}, inner_lr={inner_lr}, sample={sample}: positive"
            )
        self.tau, self.top, self.controller_lr, self.rate, self.sample = tau, top, controller_lr, inner_lr, sample
        self.alphas: list[float] = []

    def plan(self, model: Any) -> dict[str, Any]:
        if model.get_output_embeddings() is None or model.get_decoder() is model:
            raise BadInput(f"{type(model).__name__} has no decoder and head, whose step the controller looks through")
        return {
            "stock": True,
            "reason": "the student's architecture stays",
            "trains": "the student, and a controller beside it",
        }

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        same = {d.text for d in given.texts["text"]} & {d.text for d in given.texts["valid"]}
        if same:
            raise BadInput(
                f"valid: {len(same)} of its documents are in the training text: the controller would learn from them"
            )
        self.teacher = given.teacher
        device = next(model.parameters()).device
        self.mean_VC = self._class_means(given, device)
        random = torch.random.get_rng_state()
        torch.manual_seed(given.seed)
        self.controller = Controller(9 * (self.top + 1)).to(device)
        torch.random.set_rng_state(random)
        self.optimizer = torch.optim.AdamW(self.controller.parameters(), self.controller_lr, weight_decay=0.05)
        return list(model.parameters())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        ids_BN = batch["text"]
        with torch.no_grad():
            teacher_TV = self.teacher(input_ids=ids_BN, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        student_TV = model(input_ids=ids_BN, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        width = min(student_TV.shape[-1], teacher_TV.shape[-1])
        student_TV, teacher_TV, label_T = student_TV[:, :width], teacher_TV[:, :width], ids_BN[:, 1:].flatten()
        geometry = self.geometry(student_TV.detach(), teacher_TV, label_T)
        self._learn(model, batch, student_TV.detach(), teacher_TV, label_T, geometry)
        with torch.no_grad(), torch.autocast(ids_BN.device.type, enabled=False):
            alpha_T = self.controller(geometry)
        self.alphas.append(alpha_T.mean().item())
        return fused_loss(student_TV, teacher_TV, label_T, alpha_T, self.tau)

    def state(self) -> dict[str, Tensor]:
        found = {f"controller.{name}": value for name, value in self.controller.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            found |= {f"moment.{i}.{name}": value for name, value in moments.items()}
        return found | {"alphas": torch.tensor(self.alphas, dtype=torch.float64)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        prefix, moments = "controller.", dict[int, dict[str, Tensor]]()
        self.controller.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        for key, value in state.items():
            if key.startswith("moment."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.alphas = state["alphas"].tolist()

    def geometry(self, student_TV: Tensor, teacher_TV: Tensor, label_T: Tensor) -> Tensor:
        """The controller's input [T, 9 (top + 1)]."""
        best_TK = teacher_TV.topk(self.top, -1).indices
        at_TC = torch.cat([best_TK, label_T.unsqueeze(-1)], -1)
        g_TC = (at_TC == label_T.unsqueeze(-1)).float()
        s_TC, t_TC = student_TV.softmax(-1).gather(-1, at_TC), teacher_TV.softmax(-1).gather(-1, at_TC)
        return geometric_state(s_TC, t_TC, g_TC, self.mean_VC[label_T])

    def facts(self) -> dict[str, Any]:
        return {"mean_alpha_first": self.alphas[0], "mean_alpha_last": self.alphas[-1]} if self.alphas else {}

    def _learn(
        self, model: Any, batch: Batch, student_TV: Tensor, teacher_TV: Tensor, label_T: Tensor, geometry: Tensor
    ) -> None:
        """One step of the controller."""
        pick = torch.randperm(len(label_T), device=label_T.device)[: self.sample]
        valid_BN, width = batch["valid"], student_TV.shape[-1]
        with torch.no_grad():
            hidden_TD = self._hidden(model, batch["text"])[pick]
            valid_UD = self._hidden(model, valid_BN)
            valid_label_U = valid_BN[:, 1:].flatten()
            pick_u = torch.randperm(len(valid_label_U), device=label_T.device)[: self.sample]
            valid_UD, valid_label_U = valid_UD[pick_u], valid_label_U[pick_u]
            valid_UV = model.get_output_embeddings()(valid_UD).float()[:, :width]
        with torch.autocast(label_T.device.type, enabled=False):
            alpha_T = self.controller(geometry[pick])
            loss = outer_loss(
                alpha_T, hidden_TD.float(), student_TV[pick], teacher_TV[pick], label_T[pick], self.tau, self.rate,
                valid_UD.float(), valid_UV, valid_label_U,
            )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @staticmethod
    def _hidden(model: Any, ids_BN: Tensor) -> Tensor:
        return model.get_decoder()(input_ids=ids_BN, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)

    @torch.no_grad()
    def _class_means(self, given: Given, device: torch.device) -> Tensor:
        """For each label the teacher's mean short form [V, C] over training positions; unseen labels have that of all."""
        found, tokens = [], 0
        for piece in corpus.pieces(given.texts["text"], given.tokenizer, given.seq_len):
            found.append(piece)
            tokens += len(piece.ids)
            if tokens >= ENOUGH:
                break
        vocabulary, columns = max(len(given.tokenizer), 1 + max(max(p.ids) for p in found)), self.top + 1
        sum_VC, count_V = torch.zeros(vocabulary, columns, device=device), torch.zeros(vocabulary, device=device)
        size = corpus.batch_size(given.teacher, given.seq_len)
        for batch in corpus.batches(found, size, 0):
            ids_BN, mask_BN = batch.ids_BN.to(device), batch.mask_BN.to(device)
            probs_BNV = self.teacher(input_ids=ids_BN, attention_mask=mask_BN, use_cache=False).logits.float().softmax(-1)
            real_T, label_T = mask_BN[:, 1:].flatten().bool(), ids_BN[:, 1:].flatten()
            probs_TV = probs_BNV[:, :-1].flatten(0, 1)[real_T]
            label_T = label_T[real_T]
            t_TC = torch.cat([probs_TV.topk(self.top, -1).values, probs_TV.gather(-1, label_T.unsqueeze(-1))], -1)
            sum_VC.index_add_(0, label_T, t_TC)
            count_V.index_add_(0, label_T, torch.ones_like(label_T, dtype=torch.float32))
        common_C = sum_VC.sum(0) / count_V.sum().clamp(min=1)
        return torch.where(count_V.unsqueeze(1) > 0, sum_VC / count_V.clamp(min=1).unsqueeze(1), common_C)
