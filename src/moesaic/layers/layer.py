"""The layer contract: what a host must know of a layer before it builds and calls one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import MissingNeed
from moesaic.core.routing import Routing


class Layer(nn.Module):
    """`y, routing = layer(x, ctx)` for normalised x [..., D]; the host does stream + y.

    A subclass says what is different: `needs` names fields of RoutingContext, beside those of its router; `causal`
    that no token sees a later one (a class that decides it by its options sets it when built).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    causal: bool = True
    residual: bool = True
    """False: y takes the place of the stream instead of being added to it."""
    attends: ClassVar[bool] = False
    """True: the layer brings its own attention, and its host leaves out the block's own."""
    own_norm: ClassVar[bool] = False
    """True: x is the stream itself, and the layer normalises where its method says."""
    no_cache: ClassVar[str] = ""
    """Why the layer cannot decode one token at a time against a host's cache; empty when it can."""

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        raise NotImplementedError

    def context(self, ctx: RoutingContext | None) -> RoutingContext:
        return RoutingContext(mode="train" if self.training else "eval") if ctx is None else ctx

    @staticmethod
    def check_host(owner: type, needs: Iterable[str], host: Iterable[str] | None) -> None:
        """Raises MissingNeed when the host lists what it gives and something is not in it."""
        missing = set() if host is None else set(needs) - set(host)
        if missing:
            raise MissingNeed(f"{owner.__name__} needs {', '.join(sorted(missing))}, which this host does not give")

    def after_step(self) -> None:
        """Call once after every optimiser step."""


def summed_losses(passes: Iterable[Routing]) -> dict[str, Tensor]:
    """The `aux` of several routings of one layer: entries of one name are added."""
    total: dict[str, Tensor] = {}
    for routing in passes:
        for name, value in routing.aux.items():
            total[name] = total[name] + value if name in total else value
    return total
