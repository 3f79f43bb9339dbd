"""Recovery after surgery: a short fine-tuning on the task's loss and on KL to the model that was operated on."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.surgery.recovery import Recovery


@register("distill", "recover", paper="2310.01334", card="surgery-and-steering.md#merge-sparse-moe", exact=False)
class Recover(Recovery):
    """task * CE + kd * KL(teacher || student) at `temperature`, as M-SMoE and MC-SMoE recover: 1, 0.2 and 2 are theirs.

    The student is a pruned, merged or compressed checkpoint, also one that needs `import moesaic` (experts that several router
    rows share are one parameter, factors stay factors). The teacher is the model before surgery; in a recipe, by default,
    the one that the recipe was called with.

    Args:
        kd, task: weights of the two losses; kd=0 needs no teacher's forward.
        temperature: softens both distributions; KL is not multiplied by its square.
        train: what learns: "all", "moe" (MoE blocks) or "experts".
    """
