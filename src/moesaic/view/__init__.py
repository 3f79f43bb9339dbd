"""The live view of any transformers MoE: read, replace, hook and steer its experts. `moesaic.view(model)` opens it.

Importing this package makes `experts_implementation="moesaic"` known to transformers.
"""

from __future__ import annotations

import sys
import types

from torch import nn

from moesaic.view import implementation
from moesaic.view.bank import ExpertWeights, ViewBank
from moesaic.view.block import Block, Kind, View
from moesaic.view.load import Loaded, load, quiet, resolve_model
from moesaic.view.policy import Policy

__all__ = ["Block", "ExpertWeights", "Kind", "Loaded", "Policy", "View", "ViewBank", "load", "quiet", "resolve_model", "view"]

implementation.register()


def view(model: nn.Module | Loaded) -> View:
    """The MoE blocks of a transformers model, or of what `load` gave; the model does not change. Raises NotMoE if dense."""
    return View(model.model if isinstance(model, Loaded) else model)


class _Package(types.ModuleType):
    """Importing a submodule makes Python set `moesaic.view` to this package; calling it must still open a view."""

    def __call__(self, model: nn.Module | Loaded) -> View:
        return view(model)


sys.modules[__name__].__class__ = _Package
