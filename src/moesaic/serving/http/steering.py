"""`routing` of a request: which experts its tokens may use. One policy per row of the batch, so neighbours are untouched.

T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from moesaic.core.errors import BadInput
from moesaic.view import Policy, View
from moesaic.view.policy import resolve

FIELDS = ("k", "mask", "without", "bias", "force")


class Steering:
    """One `routing` field, checked against the model. Values hold for all layers, or are {layer or block name: value}."""

    def __init__(self, fields: Mapping[str, Any], blocks: View | None) -> None:
        """Raises BadInput for unknown layers, wrong sizes, and a k or ids that the model does not have."""
        if blocks is None:
            raise BadInput("routing: this model is dense, it has no experts to choose from")
        given = {name: _by_layer(value) for name, value in fields.items() if value is not None}
        self.key = json.dumps(given, sort_keys=True, default=str)
        self._force = given.pop("force", None)
        self._policy = Policy(**given)
        resolve(self.policy(1), blocks)

    def policy(self, tokens: int) -> Policy:
        """The policy for a call with this many tokens: forced experts are the same for each of them."""
        if self._force is None:
            return self._policy
        force: Any = {k: _rows(v, tokens) for k, v in self._force.items()} if isinstance(self._force, dict) else None
        force = _rows(self._force, tokens) if force is None else force
        return Policy(self._policy.k, self._policy.mask, self._policy.without, self._policy.bias, force)


def steer(blocks: View | None, rows: Sequence[Steering | None], tokens: int) -> AbstractContextManager[Any]:
    """The context for one model call of `tokens` tokens in all; equal policies are one, so a router runs once for each."""
    if blocks is None or all(row is None for row in rows):
        return nullcontext()
    made: dict[str, Policy] = {}
    policies: list[Policy | None] = []
    for row in rows:
        policies.append(None if row is None else made.setdefault(row.key, row.policy(tokens)))
    return blocks.policy(rows=policies)


def _rows(ids: Sequence[int], tokens: int) -> torch.Tensor:
    if not ids:
        raise BadInput("policy force: needs at least one expert")
    if len(set(ids)) != len(ids):
        raise BadInput("policy force: an expert stands in it twice")
    return torch.tensor(list(ids), dtype=torch.long).expand(tokens, -1)


def _by_layer(value: Any) -> Any:
    """JSON knows only strings as keys; layers are numbers."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in value.items()}
