"""What a trained surgery tells the loop: which parameters learn, what a batch costs, and what is left to do afterwards.

One loop serves fine-tuning, unlearning and distillation: it takes the parameters of `prepare` and descends `loss`. The
loop itself is handed in by who composes both (the CLI), for floor 5 does not import its neighbours.

Shape legend: B batch, N tokens of a row, D width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput

Batch = Mapping[str, Tensor]


@dataclass
class Given:
    """What a run brings beside the model: its tokenizer, the texts that it trains on by name, sizes, and a teacher."""

    tokenizer: Any
    texts: Mapping[str, list[Document]] = field(default_factory=dict)
    seq_len: int = 256
    seed: int = 0
    steps: int = 1
    teacher: Any = None


@dataclass(frozen=True)
class Stage:
    """One part of a method's training: its share of the steps, and its rate times the run's."""

    name: str
    objective: Objective
    share: float = 1.0
    lr: float = 1.0


class Objective:
    """Base of the methods that train. A subclass is built from its registered signature and knows no model until `prepare`."""

    texts: tuple[str, ...] = ("text",)
    """Names of the texts that a batch draws from."""
    needs_text: ClassVar[bool] = True
    """False where a run of no steps makes sense."""
    takes_reshaped: ClassVar[bool] = False
    """Whether a model that only `import moesaic` loads (rows that share experts, factors) can be trained so."""
    readers: ClassVar[Mapping[str, Callable[..., Any]]] = {}
    """Texts of another form than documents: name -> reader(path, tokenizer, seq_len), which the loop can draw rows from."""

    def plan(self, model: Any) -> dict[str, Any]:
        """What will be done, as facts; changes nothing. Raises BadInput for a model that this cannot be done to.

        Keys: `stock` (stock transformers loads the result), `reason`, `trains` (in words).
        """
        raise NotImplementedError

    def convert(self, model: Any, given: Given) -> Any:
        """The model to train: another one where the architecture changes."""
        return model

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        """Change what has to change before training, in place; the parameters that learn."""
        raise NotImplementedError

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a batch, a scalar. `batch` holds ids [B, N] by the names in `texts`."""
        raise NotImplementedError

    def stepped(self, done: int) -> None:
        """Called after every step of the optimiser, with the number of steps done: what must hold in between is put right."""

    def state(self) -> dict[str, Tensor]:
        """Numbers kept from step to step beside the parameters: what a training that goes on after a kill needs again."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave, after `prepare`."""

    def finish(self, model: Any) -> Any:
        """The model to save, after training (or in place of it)."""
        return model

    def facts(self) -> dict[str, Any]:
        """What `prepare` and training found out, for the report."""
        return {}

    def stages(self) -> list[Stage]:
        """What is done one after another; one stage by default."""
        return [Stage("train", self)]


class Frozen:
    """Parameters as they were, which `with frozen:` puts back for the length of a forward: the reference costs their copy only.

    Values are kept in float32, as the loop trains them, so that reference and model round alike before the first step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().float().clone() for p in self.parameters]

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """The model with its old parameters, in evaluation mode and without gradients."""
        now, training = [p.data for p in self.parameters], model.training
        try:
            for p, value in zip(self.parameters, self.values, strict=True):
                p.data = value.to(device=p.device, dtype=p.dtype)
            model.eval()
            with torch.no_grad():
                yield
        finally:
            for p, value in zip(self.parameters, now, strict=True):
                p.data = value
            model.train(training)


def token_logits(model: Any, ids_BN: Tensor) -> Tensor:
    """Logits [B, N - 1, V], float32, of every next token but the last row's."""
    return model(input_ids=ids_BN, use_cache=False).logits[:, :-1].float()


def log_probs(model: Any, ids_BN: Tensor) -> Tensor:
    """log p of each token given those before it, [B, N - 1]."""
    logits_BNV = token_logits(model, ids_BN)
    return logits_BNV.log_softmax(-1).gather(-1, ids_BN[:, 1:, None]).squeeze(-1)


def nats(model: Any, ids_BN: Tensor) -> Tensor:
    """Mean negative log-likelihood per token."""
    return -log_probs(model, ids_BN).mean()


class _Reached(Exception):
    """A layer's output has been seen: the rest of the forward is not needed."""


def layer_output(model: Any, layer: nn.Module, ids_BN: Tensor) -> Tensor:
    """Hidden states [B, N, D] that a decoder layer gives, with gradients where they are on; later layers do not run."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = layer.register_forward_hook(keep)
    try:
        model(input_ids=ids_BN, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def decoder_layers(model: Any) -> dict[int, nn.Module]:
    """Layer number -> module of the decoder's list of layers. Raises BadInput where the model has none."""
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and re.search(r"(^|\.)(layers|h|blocks)$", name)
    ]
    if not lists:
        raise BadInput(f"{type(model).__name__} has no list of decoder layers")
    return dict(enumerate(max(lists, key=lambda found: len(found[1]))[1]))


Train = Callable[..., list[float]]
"""train(model, tokenizer, texts, parameters, *, objective, steps, lr, ..., stop, progress, after, snapshot, state) -> the loss
of every step."""
