"""What transformers' Trainer must call for us: once after every optimiser step, the controllers and the step move."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class MoesaicCallback(TrainerCallback):
    """`Trainer(model, arguments, callbacks=[MoesaicCallback()])`: bias controllers, schedules and the step buffer advance.

    Called after `optimizer.step()`, so once however many micro-steps the gradient was gathered over.
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        while hasattr(model, "module"):  # DistributedDataParallel and compiled wrappers
            model = model.module
        model = getattr(model, "_orig_mod", model)
        model.after_step()
