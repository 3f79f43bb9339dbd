"""Co-selection: drop the experts that are chosen together with the fewest others."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.layer import Layer
from moesaic.surgery.scored import Scored

CARD = "surgery-and-steering.md#one-shot-expert-scores"


@register("prune", "co_selection", paper="2504.05586", card=CARD, exact=False, needs={"R0"})
class CoSelection(Scored):
    """The average number of tokens that chose e together with another expert; 0 throughout for top-1 routing.

    (A pairwise count in released code adds the two experts' own counts instead; this one counts tokens that chose both.)
    """

    def score(self, layer: Layer) -> Tensor:
        together_EE = layer.statistics["co_selection_count"]
        return (together_EE.sum(1) - together_EE.diagonal()) / max(len(together_EE) - 1, 1)
