"""Twin-Merging: one merged model, a compressed difference for each task, and a router that adds those that an input needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.models.upcycled.twin_merging import Difference, places, pooled
from moesaic.surgery.conversion import Told
from moesaic.surgery.dense import Dense
from moesaic.surgery.living import Living, build, opened
from moesaic.surgery.passes import opened as with_tokenizer
from moesaic.surgery.passes import rows

MODES = ("svd", "magnitude", "bernoulli")


@register("upcycle", "twin_merging", paper="2406.15479", card="surgery-and-steering.md#twin-merging", exact=False)
class TwinMerging(Living):
    """The first model is the seed, the others are fine-tuned copies of it, each on one task.

    Shared: seed + `scale` * sum of (task - seed). Exclusive: v_t = compress(task - shared), relative to the shared model:
    `svd` keeps density * rank singular values, `magnitude` the largest elements, `bernoulli` random ones divided by their
    share. Vectors (norms) are kept whole, biases left to the shared model; the language model's head is no classifier head,
    and has its difference. Per sample: weights of the tasks = softmax(router(mean last hidden state of the shared model)),
    then a second pass with shared + sum of w_t v_t, in factors, so that samples of other weights share a batch.

    The router is trained on --data, whose domains are the tasks: named as the folders, or in `tasks` in the models' order.
    Released settings: Adam 5e-4, 50 epochs of batches of 1024; rows of text that are fewer make one batch.
    """

    least, most = 2, 65

    def __init__(
        self, density: float = 0.1, scale: float = 0.3, mode: str = "svd", epochs: int = 50, router_lr: float = 5e-4,
        tasks: Sequence[str] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if mode not in MODES:
            raise BadInput(f"mode={mode!r}: one of {', '.join(MODES)}")
        if not 0 < density <= 1 or epochs < 0 or router_lr <= 0:
            raise BadInput(f"density={density}, epochs={epochs}, router_lr={router_lr}: a share above 0, and no less than 0")
        self.density, self.scale, self.mode, self.epochs = density, scale, mode, epochs
        self.router_lr, self.tasks, self.seed = router_lr, None if tasks is None else list(tasks), seed

    def needs(self) -> int:
        return 1

    def spec(self, models: Sequence[Dense]) -> dict[str, Any]:
        tasks = [model.folder.name for model in models[1:]] if self.tasks is None else self.tasks
        if len(tasks) != len(models) - 1 or len(set(tasks)) < len(tasks):
            raise BadInput(f"tasks {', '.join(tasks)}: one name for each of the {len(models) - 1} models after the seed")
        return {"method": "twin_merging", "tasks": tasks, "mode": self.mode, "density": self.density}

    def grows(self, models: Sequence[Dense]) -> int:
        return round(models[0].table.nbytes * (1 + 2 * self.density * (len(models) - 1)))

    def make(self, models: Sequence[Dense], told: Told) -> Any:
        torch.manual_seed(self.seed)
        spec = self.spec(models)
        missing = [task for task in spec["tasks"] if task not in told.texts]
        if missing:
            raise BadInput(
                f"twin_merging: no text of domain {missing[0]}, which its router learns to know: there is "
                f"{', '.join(told.texts)}; name the folders as the domains, or the domains with tasks"
            )
        states = [opened(model).state_dict() for model in models]
        made = build(models, spec).eval()
        merge(made, states, self.scale, self.mode, torch.Generator().manual_seed(self.seed))
        _, tokenizer = with_tokenizer(models[0].folder, told.trust_remote_code)
        found = [rows(tokenizer, told.texts[task], told.seq_len, told.max_tokens) for task in spec["tasks"]]
        train_router(made, found, self.epochs, self.router_lr)
        return made


@torch.no_grad()
def merge(made: Any, states: Sequence[dict[str, Tensor]], scale: float, mode: str, random: torch.Generator) -> None:
    """The shared weights and every task's difference into the model; `states`: the seed's, then the tasks'."""
    for name, tensor in made.state_dict().items():
        if name in states[0]:
            tensor.copy_(shared(states, name, scale))
    for name, module in places(made).items():
        twin, key = made.twins[name.replace(".", "/")], f"{name}.weight"
        weight: Any = module.weight
        for m, state in enumerate(states[1:]):
            difference = state[key].float() - weight.float()
            if isinstance(twin, Difference):
                compress(twin, m, difference, mode, random)
            else:
                twin["vector_MD"][m] = difference


def shared(states: Sequence[dict[str, Tensor]], name: str, scale: float) -> Tensor:
    """seed + scale * sum of (task - seed), taken in float64."""
    seed = states[0][name].double()
    return (seed + scale * sum(state[name].double() - seed for state in states[1:])).to(states[0][name].dtype)


@torch.no_grad()
def compress(twin: Difference, m: int, matrix_OI: Tensor, mode: str, random: torch.Generator) -> None:
    """What is kept of a difference, into task m's place."""
    if mode == "svd":
        left, values, right = torch.linalg.svd(matrix_OI.float(), full_matrices=False)
        rank = twin.right_MRI.shape[1]
        twin.left_MOR[m] = left[:, :rank] * values[:rank]
        twin.right_MRI[m] = right[:rank]
        return
    flat, size = matrix_OI.flatten(), twin.values_MS.shape[1]
    if mode == "magnitude":
        kept, gain = flat.abs().topk(size).indices.sort().values, 1.0
    else:
        kept, gain = torch.randperm(len(flat), generator=random)[:size].sort().values, len(flat) / size
    twin.places_MS[m] = kept
    twin.values_MS[m] = flat[kept] * gain


def train_router(made: Any, batches: Sequence[Sequence[Tensor]], epochs: int, lr: float) -> list[float]:
    """Adam on cross-entropy to the task that each row of text is of; the loss of every epoch."""
    decoder, features, labels = made.get_decoder(), [], []
    for task, found in enumerate(batches):
        for ids_BN in found:
            features.append(pooled(decoder, (), {"input_ids": ids_BN}).float())
            labels.append(task)
    x_BD, y_B, losses = torch.cat(features), torch.tensor(labels), []
    router = made.task_router.float().train()
    optimizer = torch.optim.Adam(router.parameters(), lr)
    for _ in range(epochs if len(x_BD) > 1 else 0):
        for rows_B in torch.randperm(len(x_BD)).split(1024):
            if len(rows_B) < 2:  # batch norm has no variance of one row
                continue
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(router(x_BD[rows_B]), y_B[rows_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    router.eval().to(made.dtype)
    return losses
