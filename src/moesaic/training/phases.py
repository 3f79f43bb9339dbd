"""Phases of a run that change the model between two steps: EvoMoE's diversification.

A phase is a function of the step alone, so that a resumed run stands in the phase where the whole one stood.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.experts.bank import ExpertBank
from moesaic.experts.spawn import spawn
from moesaic.training.config import TrainConfig


class Phases:
    """`before(step)` in front of every step, `resume(step)` after a checkpoint was loaded, `close()` at the end.

    With `spawn` every router row of every bank runs expert `source` until step `at`; there the others become varied
    copies of it. Raises BadInput for a model without banks of this package, or without such an expert.
    """

    def __init__(self, config: TrainConfig, model: Any) -> None:
        self.rule, self.seed, self._tied = config.spawn, config.seed, False
        self.banks = [module for module in model.modules() if isinstance(module, ExpertBank)]
        if self.rule is None:
            return
        for bank in self.banks:
            if bank.row_to_expert is not None or bank.keyed or not bank.stacked:
                raise BadInput(
                    f"spawn: the experts of {type(bank).__name__} are not alike, or are shared: none can become another"
                )
            if self.rule.source >= len(bank):
                raise BadInput(f"spawn.source: no expert {self.rule.source}: a layer has {len(bank)}")
        if not self.banks:
            raise BadInput("spawn: this model has no banks of experts; it works with model_type moesaic")
        self._tie(True)

    def before(self, step: int) -> None:
        """Do what is due before `step`."""
        if self.rule is None or not self._tied or step < self.rule.at:
            return
        self._tie(False)
        for layer, bank in enumerate(self.banks):
            random = torch.Generator().manual_seed(self.seed * 1009 + layer)
            spawn(bank, self.rule.source, self.rule.zeroed, self.rule.noise, random)

    def resume(self, step: int) -> None:
        """Stand where a run stands that has done `step` steps: the first step after the change has already seen it."""
        if self.rule is not None:
            self._tie(step <= self.rule.at)

    def close(self) -> None:
        if self._tied:
            self._tie(False)

    def _tie(self, tied: bool) -> None:
        """Let every router row run the source, or its own expert."""
        assert self.rule is not None
        self._tied = tied
        for bank in self.banks:
            source = self.rule.source
            device = next(bank.parameters()).device
            bank.row_to_expert = torch.full((len(bank),), source, dtype=torch.int64, device=device) if tied else None
