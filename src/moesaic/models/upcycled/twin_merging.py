"""Twin-Merging in a transformers decoder: shared weights, compressed differences per task, added by what an input looks like.

Shape legend: B batch, N tokens, D width, M tasks, O, I rows and columns of a matrix, R rank, S kept elements.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput


class Weights:
    """Of the tasks, for every sample of the call in progress: [B, M]; None for the shared model. `forced` stands for all."""

    def __init__(self) -> None:
        self.weights_BM: Tensor | None = None
        self.forced: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Weights:
        return memo.setdefault(id(self), Weights())

    @contextmanager
    def using(self, weights_BM: Tensor | None) -> Any:
        before, self.weights_BM = self.weights_BM, weights_BM
        try:
            yield
        finally:
            self.weights_BM = before


class Difference(nn.Module):
    """The differences of one matrix [O, I], applied to inputs: sum over tasks of w_m U_m (V_m x), without forming it.

    `kind` svd: factors of `size` ranks; sparse: `size` elements of each task, by their places.
    """

    def __init__(self, kind: str, tasks: int, rows: int, columns: int, size: int) -> None:
        super().__init__()
        self.kind, self.shape = kind, (rows, columns)
        if kind == "svd":
            self.left_MOR = nn.Parameter(torch.zeros(tasks, rows, size))
            self.right_MRI = nn.Parameter(torch.zeros(tasks, size, columns))
        else:
            self.values_MS = nn.Parameter(torch.zeros(tasks, size))
            self.places_MS: Tensor
            self.register_buffer("places_MS", torch.zeros(tasks, size, dtype=torch.int64))

    def forward(self, x: Tensor, weights_BM: Tensor) -> Tensor:
        """[B, ..., I] to [B, ..., O]."""
        parts = [_per_sample(weights_BM[:, m], x) * self.apply_one(m, x) for m in range(weights_BM.shape[1])]
        return torch.stack(parts).sum(0)

    def apply_one(self, m: int, x: Tensor) -> Tensor:
        if self.kind == "svd":
            return (x @ self.right_MRI[m].T) @ self.left_MOR[m].T
        return torch.sparse.mm(self.matrix(m), x.flatten(0, -2).T).T.reshape(*x.shape[:-1], self.shape[0])

    def rows(self, m: int, ids: Tensor) -> Tensor:
        """Rows of the difference, as an embedding looks them up: [..., I]."""
        if self.kind == "svd":
            return self.left_MOR[m][ids] @ self.right_MRI[m]
        return self.matrix(m).to_dense()[ids]

    def matrix(self, m: int) -> Tensor:
        """Sparse [O, I]."""
        places = self.places_MS[m]
        where = torch.stack([places // self.shape[1], places % self.shape[1]])
        return torch.sparse_coo_tensor(where, self.values_MS[m], self.shape)

    def dense(self, m: int) -> Tensor:
        return self.left_MOR[m] @ self.right_MRI[m] if self.kind == "svd" else self.matrix(m).to_dense()


def _per_sample(weight_B: Tensor, like: Tensor) -> Tensor:
    return weight_B.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


class TaskRouter(nn.Module):
    """Pooled hidden states [B, D] to logits [B, M]: two layers of 2D with batch norm, leaky ReLU and dropout of a half."""

    def __init__(self, dim: int, tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (dim, 2 * dim):
            layers += [nn.Linear(width, 2 * dim), nn.BatchNorm1d(2 * dim), nn.LeakyReLU(), nn.Dropout(0.5)]
        self.layers = nn.Sequential(*layers, nn.Linear(2 * dim, tasks))

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.layers(x_BD)


def places(model: Any) -> dict[str, nn.Module]:
    """The modules whose weight has a difference: linear layers, embeddings, norms. Biases have none."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not name.startswith(("task_router", "twins"))
    }


def sizes(shape: tuple[int, ...], mode: str, density: float) -> int:
    """Ranks or elements that a matrix keeps."""
    return max(1, int(density * (min(shape) if mode == "svd" else shape[0] * shape[1])))


def install(model: Any, spec: dict[str, Any]) -> None:
    """`spec`: tasks (names), mode (svd, magnitude, bernoulli), density."""
    M, held, twins = len(spec["tasks"]), Weights(), nn.ModuleDict()
    kind = "svd" if spec["mode"] == "svd" else "sparse"
    for name, module in places(model).items():
        weight: Any = module.weight
        key = name.replace(".", "/")
        if weight.dim() == 1:
            twins[key] = nn.ParameterDict({"vector_MD": nn.Parameter(torch.zeros(M, *weight.shape))})
        else:
            twins[key] = Difference(
                kind, M, weight.shape[0], weight.shape[1], sizes(tuple(weight.shape), spec["mode"], spec["density"])
            )
        module.register_forward_hook(_adding(twins[key], held))
    model.twins, model.task_weights = twins, held
    model.task_router = TaskRouter(model.config.hidden_size, M)
    own = model.get_decoder()

    def around(args: tuple, kwargs: dict[str, Any]) -> Any:
        """The weights of the tasks stay in force until the logits are there, for the head has a difference too."""
        return held.using(_weights(model, own, held, args, {key: kwargs[key] for key in ASKED if key in kwargs}))

    model.around_call = around


ASKED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")
"""What the first pass, which looks at the input, takes of a call."""


def _weights(model: Any, own: Any, held: Weights, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """[B, M] from the shared model's last hidden states; what a cache was begun with while it goes on."""
    x: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    if held.forced is not None:
        return held.forced.expand(len(x), -1)
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        if not hasattr(cache, "task_weights_BM"):
            raise BadInput("twin_merging: this cache does not know its tasks: pass one cache to every call, from the first on")
        return cache.task_weights_BM
    asked = {key: value for key, value in kwargs.items() if key != "past_key_values"}
    weights_BM = model.task_router(pooled(own, args, asked)).softmax(-1)
    if cache is not None:
        cache.task_weights_BM = weights_BM
    return weights_BM


def pooled(own: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Mean over real tokens of the last hidden states, [B, D]."""
    with torch.no_grad():
        hidden_BND = own(*args, **{**kwargs, "use_cache": False}).last_hidden_state
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real_BN1 = mask[:, -hidden_BND.shape[1] :, None].to(hidden_BND.dtype)
        return (hidden_BND * real_BN1).sum(1) / real_BN1.sum(1).clamp(min=1)
    return hidden_BND.mean(1)


def _adding(twin: Any, held: Weights) -> Any:
    """A forward hook: the module's output with its tasks' differences."""

    def add(module: Any, args: tuple, output: Tensor) -> Tensor | None:
        weights_BM = held.weights_BM
        if weights_BM is None:
            return None
        x = args[0]
        if isinstance(module, nn.Embedding):
            parts = [_per_sample(weights_BM[:, m], output) * twin.rows(m, x) for m in range(weights_BM.shape[1])]
            return output + torch.stack(parts).sum(0)
        if isinstance(twin, Difference):
            return output + twin(x, weights_BM)
        ones = {"weight": torch.ones_like(module.weight)}
        scale = torch.einsum("bm,md->bd", weights_BM.to(output.dtype), twin["vector_MD"])
        with held.using(None):  # the hook stays silent
            plain = torch.func.functional_call(module, ones, (x,))
        return output + plain * scale.view(len(scale), *[1] * (output.dim() - 2), -1)

    return add
