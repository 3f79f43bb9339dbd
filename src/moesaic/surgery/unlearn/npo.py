"""NPO: the text to forget as the rejected half of a preference, against the model as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.objective import Batch
from moesaic.surgery.unlearning import Retaining, sequence_log_probs


def npo_loss(ratio_B: Tensor, beta: float) -> Tensor:
    """-(2 / beta) mean log sigma(-beta r), r = log pi - log pi_ref of whole sequences: (2 / beta) log 2 at r = 0."""
    return -2 / beta * logsigmoid(-beta * ratio_B).mean()


@register("unlearn", "npo", paper="2404.05868", card="surgery-and-steering.md#seuf--uoe", exact=False)
class NPO(Retaining):
    """`npo_loss` on the forget text + retain_weight R(retain).

    As beta falls its gradient becomes GA's (of whole sequences); as r falls below -1 / beta it fades, which is what bounds
    it. beta is 0.1 in the released code and 0.001 in SEUF's paper.
    """

    def __init__(self, beta: float = 0.1, retain_weight: float = 1.0, retain: str = "nll") -> None:
        super().__init__(retain, retain_weight)
        if beta <= 0:
            raise BadInput(f"beta={beta}: must be positive")
        self.beta = beta

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        return True

    def forget(self, model: Any, batch: Batch) -> Tensor:
        ids_BN = batch["forget"]
        with self.frozen(model):
            before_B = sequence_log_probs(model, ids_BN)
        return npo_loss(sequence_log_probs(model, ids_BN) - before_B, self.beta)
