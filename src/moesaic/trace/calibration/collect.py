"""Hooks that gather a calibration's statistics from the calls of some layers while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.trace import calls, segments
from moesaic.trace.calibration.tiers import FORWARD, Seen, Statistics, collect
from moesaic.view import View
from moesaic.view.block import Block
from moesaic.view.slots import token_major
from moesaic.view.tap import Choice


class Enough(Exception):
    """The last layer that was asked for has run: the rest of the pass is not needed."""


class Collector:
    """Collects while inside `with`; `sums[layer][domain]` grows. `domains` names the rows of the batch under way.

    With `stop`, a pass ends by `Enough` after the last of `layers`: what comes behind it would be computed for nothing.
    """

    def __init__(
        self,
        blocks: View,
        tiers: Sequence[str],
        layers: Sequence[int],
        *,
        by_domain: bool = False,
        every: int = 1,
        features: BinaryIO | None = None,
        stop: bool = False,
    ) -> None:
        self.blocks, self.tiers, self.layers, self.by_domain, self.every = blocks, tiers, layers, by_domain, every
        self.features, self.stop = features, stop
        self.sums: dict[int, dict[str, Statistics]] = {layer: {} for layer in layers}
        self.domains: list[str] = []
        self._call: calls.Call | None = None
        self._kept: segments.Columns = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Collector:
        self._hooks.enter_context(calls.watch_calls(self.blocks.model, self._before, lambda output: None))
        wanted = [name for name in self.tiers if name in FORWARD]
        for layer in self.layers:
            block = self.blocks[layer]
            if wanted:
                self._hooks.enter_context(block.on_choice(self._watcher(layer, wanted), scores=True))
            if self.features is not None:
                self._hooks.enter_context(block.on_experts(self._feature_hook(layer)))
            if self.stop and layer == self.layers[-1]:
                self._hooks.enter_context(block.on_experts(_end))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def end_batch(self) -> None:
        """Write the batch's features, if they are kept."""
        if self.features is not None and self._kept:
            segments.append(self.features, self._kept, {})
            self._kept = {}

    def _before(self, call: calls.Call) -> None:
        self._call, self._kept = call, {}

    def _watcher(self, layer: int, wanted: list[str]) -> Callable[[Choice, Block], None]:
        @torch.no_grad()
        def watch(choice: Choice, block: Block) -> None:
            ids_TK = choice.ids.reshape(-1, choice.ids.shape[-1]).long()
            ids_TK = torch.where((ids_TK >= 0) & (ids_TK < block.num_experts), ids_TK, -1)
            x_TD = choice.x.reshape(len(ids_TK), -1)
            logits_TE = block.logits(choice)
            if logits_TE is not None and len(logits_TE) != len(ids_TK):
                logits_TE = None
            weights_TK = choice.weights.reshape(ids_TK.shape)
            for domain, rows_T in self._rows(len(ids_TK)):
                seen = Seen(x_TD, ids_TK, weights_TK, logits_TE)
                if rows_T is not None:
                    seen = seen.only(rows_T.to(ids_TK.device))
                if len(seen.ids_TK):
                    self._add(layer, domain, seen, block, wanted)

        return watch

    def _add(self, layer: int, domain: str, seen: Seen, block: Block, wanted: list[str]) -> None:
        collect(self.sums[layer].setdefault(domain, {}), seen, block, wanted, self.every)

    def _rows(self, tokens: int) -> list[tuple[str, Tensor | None]]:
        """Domains of a call and which of its tokens are theirs; None for all. Padding is in none."""
        call = self._call
        if call is None or call.tokens_BN is None or call.tokens_BN.numel() != tokens:
            if call is not None and call.mask_BN is not None and not bool((call.mask_BN != 0).all()):
                raise BadInput(f"a layer saw {tokens} tokens of a padded batch of another size: calibrate with --batch-size 1")
            return [(self.domains[0] if self.by_domain and self.domains else "", None)]
        real_BN = None if call.mask_BN is None else call.mask_BN != 0
        if not self.by_domain or not self.domains:
            return [("", None if real_BN is None or bool(real_BN.all()) else real_BN.reshape(-1))]
        found: list[tuple[str, Tensor | None]] = []
        for name in dict.fromkeys(self.domains):
            mine_B = torch.tensor([domain == name for domain in self.domains], device=call.tokens_BN.device)
            rows_BN = mine_B[:, None].expand(call.tokens_BN.shape)
            found.append((name, (rows_BN if real_BN is None else rows_BN & real_BN).reshape(-1)))
        return found

    def _feature_hook(self, layer: int) -> Callable[..., None]:
        def keep(x: Tensor, routing: Any, y: Tensor, block: Block) -> None:
            tokens = token_major(routing)[0].shape[0]
            rows_T = self._rows(tokens)[0][1] if not self.by_domain else None
            for side, values in (("input", x), ("output", y)):
                flat = values.detach().reshape(tokens, -1).float().cpu()
                self._kept[f"{layer}.{side}"] = (flat if rows_T is None else flat[rows_T.cpu()]).numpy().astype(np.float32)

        return keep


def _end(x: Tensor, routing: Any, y: Tensor, block: Block) -> None:
    raise Enough
