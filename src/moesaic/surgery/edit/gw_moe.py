"""GW-MoE fine-tuning: tokens that the router is unsure of go to every expert while it trains; the checkpoint stays stock."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.surgery.retrofitting import Retrofitting


@register("edit", "gw_moe", paper="2406.12375", card="surgery-and-steering.md#gw-moe", exact=False)
class GWMoE(Retrofitting):
    """Fine-tunes with routing/gw_moe.py in the routers' place, then hands the trained rows back to the model's own.

    `threshold` in nats: a token above it is unsure; the default is the paper's share of ln E. `slots` such tokens per
    sequence, at most: 8 is what the released code gives an encoder, and 1 its decoder.
    """

    router = "gw_moe"

    def __init__(self, threshold: float | None = None, slots: int = 8, train: str = "router+experts") -> None:
        super().__init__(train, threshold=threshold, slots=slots)
