"""C3PO: a prompt's routing moves towards that of similar prompts which the model answered rightly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.steering.kept import kept
from moesaic.steering.references import Embed, References, look
from moesaic.steering.steer import Steer
from moesaic.view import Policy
from moesaic.view.course import Course, Steps
from moesaic.view.policy import resolve

MOST = 100
"""Neighbours, and steps: a request must not keep a server busy for long."""
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that several tokens may go on from; recurrent states may not."""
ALPHAS = tuple(i / 10 for i in range(11))


@register(
    "steering", "c3po", paper="2504.07964", exact=False,
    card="surgery-and-steering.md#c3po-re-mix-expert-pathways-of-the-critical-layers-at-test-time",
)  # fmt: skip
class C3po(Steer):
    """omega [layers, E] is the softmax over all experts of the prompt's last token in the last `layers` MoE layers; it
    replaces that softmax, before top-k, there and in no other token.

    The `neighbours` nearest references (similarity above `leak` left out) weigh K = exp(-d^2 / 2 h^2), d the distance of
    embeddings of length 1, h^2 the mean d^2 of the neighbours (the paper gives no width), or K = the cosine
    (`kernel="cosine"`, as the released code).
    `how`: "regression": a omega + (1 - a) sum K omega_i / sum K; "mode": `steps` mean shifts, the weights K(omega, omega_i) in
    omega space; "ngd": `steps` gradient steps of rate `lr` on L(omega) = sum K loss(neighbour's answer | omega) / sum K, each
    put back on the simplex. `alpha` None is a line search over 0, 0.1 .. 1 on L (0.5 for "mode"). Only the `core` experts that
    weigh most at first move (20 of 64 by default), and the rest keep their mass before the whole is scaled to 1.
    `decode` also replaces in every step of decoding, as the released code does; the paper means the prompt's last token.
    `where="first"` moves the first `layers` layers instead, a control that the paper compares with.
    Routers must score by softmax. Without a neighbour nothing changes.
    """

    files: ClassVar[frozenset[str]] = frozenset({"store"})

    def __init__(
        self,
        store: str | References,
        how: Literal["regression", "ngd", "mode"] = "regression",
        layers: int = 5,
        core: int | None = None,
        neighbours: int = 3,
        alpha: float | None = None,
        steps: int = 10,
        lr: float = 0.1,
        kernel: Literal["gaussian", "cosine"] = "gaussian",
        leak: float = 0.95,
        decode: bool = False,
        where: Literal["last", "first"] = "last",
    ) -> None:
        if how not in ("regression", "ngd", "mode") or kernel not in ("gaussian", "cosine"):
            raise BadInput(f"c3po: how {how!r} is regression, ngd or mode; kernel {kernel!r} is gaussian or cosine")
        if where not in ("last", "first"):
            raise BadInput(f"c3po: where {where!r} is last or first")
        if (
            min(layers, neighbours, steps) < 1
            or max(neighbours, steps) > MOST
            or not 0 <= lr < float("inf")
            or not 0 < leak <= 1.001
        ):
            raise BadInput(f"c3po: layers {layers}, neighbours {neighbours}, steps {steps}, lr {lr}, leak {leak}: out of range")
        if alpha is not None and not 0 <= alpha <= 1:
            raise BadInput(f"c3po: alpha {alpha}: from 0 (the neighbours') to 1 (unchanged)")
        self.store = store if isinstance(store, References) else kept(References.read, store)
        self.how, self.layers, self.core, self.neighbours, self.alpha = how, layers, core, neighbours, alpha
        self.count, self.lr, self.kernel, self.leak, self.decode = steps, lr, kernel, leak, decode
        self.where = where
        self.embed: Embed | None = None
        """Set it to use another embedding than the store's default."""

    def check(self) -> None:
        blocks = self.experts()
        names = tuple(block.name for block in blocks)
        if names != self.store.blocks or max(b.num_experts for b in blocks) != self.store.pathway_nLE.shape[2]:
            raise BadInput(
                f"c3po: the references are of {self.store.model or 'another model'}, whose experts differ: build them again"
            )
        self.span = slice(max(0, len(blocks) - self.layers), None) if self.where == "last" else slice(self.layers)
        counts = {block.num_experts for block in list(blocks)[self.span]}
        if self.core is not None and not 1 <= self.core <= min(counts):
            raise BadInput(f"c3po: core {self.core}: between 1 and the {min(counts)} experts of a layer")
        resolve(self.policy(self.store.pathway_nLE[0, self.span]), blocks)

    def steps(self, prompt_ids: Sequence[int]) -> Steps[Course]:
        with torch.inference_mode(False):
            own_LE, vector_M = look(self.model, self.experts(), prompt_ids, self.embed)
            near, weight_k = self.near(vector_M)
        if not near:
            return Course(notes={"c3po_neighbours": 0})
        moved_LE, alpha = yield from self.moved(own_LE[self.span], near, weight_k)
        notes = {"c3po_neighbours": len(near), "c3po_alpha": alpha}
        return Course(policy=None if alpha == 1 else self.policy(moved_LE), notes=notes)

    def near(self, vector_M: Tensor) -> tuple[list[int], Tensor]:
        """The nearest references, and the kernel weight of each."""
        cosine_n = self.store.embedding_nM @ vector_M
        allowed = (cosine_n <= self.leak).nonzero()[:, 0]
        order = allowed[cosine_n[allowed].argsort(descending=True)][: self.neighbours]
        cosine_k = cosine_n[order]
        if self.kernel == "cosine":
            return order.tolist(), cosine_k.clamp(min=1e-6)
        return order.tolist(), gaussian((2 - 2 * cosine_k).clamp(min=0))

    def moved(self, own_LE: Tensor, near: list[int], weight_k: Tensor) -> Steps[tuple[Tensor, float | None]]:
        """omega and the alpha that made it (None for ngd)."""
        theirs_kLE = self.store.pathway_nLE[near, self.span]
        core_LE = self.core_of(own_LE)
        if self.how == "ngd":
            return (yield from self.descend(own_LE, core_LE, near, weight_k)), None
        if self.how == "mode":
            alpha = 0.5 if self.alpha is None else self.alpha
            return mean_shift(own_LE, theirs_kLE, alpha, self.count, core_LE), alpha
        mean_LE = average(theirs_kLE, weight_k)
        alphas = ALPHAS if self.alpha is None else (self.alpha,)
        tried = [within(own_LE, a * own_LE + (1 - a) * mean_LE, core_LE) for a in alphas]
        if len(alphas) == 1:
            return tried[0], alphas[0]
        losses = [0.0] * len(alphas)
        for i, share in zip(near, shares(weight_k), strict=True):
            prefix = yield from self.prefix(i)
            for number, omega_LE in enumerate(tried):
                with torch.inference_mode(False), torch.no_grad():
                    losses[number] += share * float(self.loss(omega_LE, i, prefix))
                yield
        best = min(range(len(alphas)), key=lambda i: (losses[i], -alphas[i]))
        return tried[best], alphas[best]

    def core_of(self, own_LE: Tensor) -> Tensor:
        """Which experts may move, bool [layers, E]."""
        count = self.core if self.core is not None else max(1, round(own_LE.shape[1] * 20 / 64))
        return torch.zeros_like(own_LE, dtype=torch.bool).scatter(1, own_LE.topk(count, -1).indices, True)

    def descend(self, own_LE: Tensor, core_LE: Tensor, near: list[int], weight_k: Tensor) -> Steps[Tensor]:
        prefixes = []
        for i in near:
            prefixes.append((yield from self.prefix(i)))
        with torch.inference_mode(False):
            omega_LE = own_LE.clone()
        for _ in range(self.count):
            slope_LE = torch.zeros_like(omega_LE)
            for i, share, prefix in zip(near, shares(weight_k), prefixes, strict=True):
                with torch.inference_mode(False), torch.enable_grad():
                    given_LE = omega_LE.clone().requires_grad_()
                    loss = self.loss(given_LE, i, prefix)
                    if not loss.requires_grad:
                        raise BadInput(
                            "c3po: these experts have no backward pass (weights of few bits): how=regression or mode"
                        )
                    slope_LE = slope_LE + share * torch.autograd.grad(loss, given_LE)[0]
                yield
            with torch.inference_mode(False):
                omega_LE = within(omega_LE, (omega_LE - self.lr * slope_LE).clamp(min=0), core_LE)
        return omega_LE

    def prefix(self, i: int) -> Steps[Any]:
        """A cache of a neighbour's prompt but its last token, which no omega touches; None where a cache cannot be read on
        from by several tokens."""
        ids = self.store.prompts[i][:-1]
        if not ids:
            return None
        with torch.inference_mode(False), torch.no_grad():
            cache = self.model(input_ids=self.given(ids), use_cache=True).past_key_values
        yield
        return cache if all(type(layer) in PLAIN for layer in getattr(cache, "layers", [None])) else None

    def loss(self, omega_LE: Tensor, i: int, prefix: Any = None) -> Tensor:
        """The loss of neighbour i's answer after its own prompt, whose last token takes omega. `prefix` stays as it is."""
        prompt, answer = self.store.prompts[i], self.store.answers[i]
        at = 0 if prefix is not None else len(prompt) - 1
        read: dict[str, Any] = {"use_cache": False}
        if prefix is not None:
            read = {"past_key_values": copy.deepcopy(prefix), "use_cache": True}
        given = self.given([*prompt[len(prompt) - 1 - at :], *answer[:-1]])
        with self.experts().policy(rows=[self.policy(omega_LE, at=at)]):
            logits_AV = self.model(input_ids=given, **read).logits[0, at:]
        return torch.nn.functional.cross_entropy(logits_AV.float(), torch.tensor(answer, device=logits_AV.device))

    def given(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self.model.get_input_embeddings().weight.device)

    def policy(self, omega_LE: Tensor, at: Any = None) -> Policy:
        blocks = list(self.experts())[self.span]
        probs = {block.name: row[: block.num_experts] for block, row in zip(blocks, omega_LE, strict=True)}
        return Policy(probs=probs, at=("last" if self.decode else "prompt") if at is None else at)


def shares(weight_k: Tensor) -> list[float]:
    """K / sum K."""
    return (weight_k / weight_k.sum()).tolist()


def gaussian(squared_k: Tensor) -> Tensor:
    """exp(-d^2 / 2 h^2) with h^2 the mean of d^2; all 1 where every distance is 0."""
    width = squared_k.mean()
    return torch.exp(-squared_k / (2 * width)) if width > 0 else torch.ones_like(squared_k)


def average(omega_kLE: Tensor, weight_k: Tensor) -> Tensor:
    """sum K omega / sum K."""
    return (omega_kLE * weight_k.view(-1, 1, 1)).sum(0) / weight_k.sum()


def mean_shift(own_LE: Tensor, theirs_kLE: Tensor, alpha: float, steps: int, core_LE: Tensor) -> Tensor:
    """omega <- alpha omega + (1 - alpha) (kernel average in omega space), `steps` times."""
    omega_LE = own_LE
    for _ in range(steps):
        weight_k = gaussian((theirs_kLE - omega_LE).square().sum((1, 2)))
        omega_LE = within(omega_LE, alpha * omega_LE + (1 - alpha) * average(theirs_kLE, weight_k), core_LE)
    return omega_LE


def within(own_LE: Tensor, moved_LE: Tensor, core_LE: Tensor) -> Tensor:
    """`moved` for the core experts, `own` for the others, each row scaled to 1; rows that did not move stay bit for bit."""
    mixed_LE = torch.where(core_LE, moved_LE, own_LE)
    same_L1 = (mixed_LE == own_LE).all(1, keepdim=True)
    return torch.where(same_L1, own_LE, mixed_LE / mixed_LE.sum(1, keepdim=True).clamp(min=1e-30))
