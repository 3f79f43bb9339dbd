"""What one call of a model is about: its rows, which tokens are padding, and which sequences they belong to.

Shape legend: B rows of the batch, N new tokens per row.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from moesaic.view.tap import Handle


class Call(NamedTuple):
    """One forward pass. Tensors stay where the model has them."""

    tokens_BN: Tensor | None
    mask_BN: Tensor | None
    """Not 0 where a token is real; None where all are."""
    positions_BN: Tensor | None
    """Positions as given by the caller; several sequences packed in one row show as jumps."""
    cache: Any
    continues: bool
    """The rows go on with those of an earlier call, whose keys and values they attend to."""
    decoder_tokens_BN: Tensor | None = None
    decoder_mask_BN: Tensor | None = None

    def part(self, decoder: bool) -> Call:
        """The decoder's side of an encoder-decoder call."""
        return self._replace(tokens_BN=self.decoder_tokens_BN, mask_BN=self.decoder_mask_BN) if decoder else self


def read_call(model: nn.Module, args: tuple, kwargs: dict[str, Any], names: list[str]) -> Call:
    """Understand the arguments of `model(*args, **kwargs)`; `names` are the parameters of its forward."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    tokens = _matrix(given.get("input_ids"))
    shape = tokens.shape if tokens is not None else None
    if shape is None and isinstance(given.get("inputs_embeds"), Tensor):
        shape = given["inputs_embeds"].shape[:2]
    cache = given.get("past_key_values")
    decoder = _matrix(given.get("decoder_input_ids"))
    return Call(
        tokens,
        _mask(given.get("attention_mask"), shape),
        _matrix(given.get("position_ids")),
        cache,
        _cached_tokens(cache) > 0,
        decoder,
        _mask(given.get("decoder_attention_mask"), None if decoder is None else decoder.shape),
    )


def watch_calls(model: nn.Module, before: Callable[[Call], None], after: Callable[[Any], None]) -> Handle:
    """Call before(call) and after(output) around every forward pass of `model`, also when the pass fails."""
    names = list(inspect.signature(model.forward).parameters)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        before(read_call(module, args, kwargs, names))

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(lambda module, args, output: after(output), always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return Handle(undo)


class Sequences:
    """Numbers the sequences that pass by. A call with a cache that is not empty goes on with that cache's sequences."""

    def __init__(self, first: int = 0) -> None:
        self.count = first
        self._of_cache: weakref.WeakKeyDictionary[Any, dict[str, range]] = weakref.WeakKeyDictionary()

    def rows(self, call: Call, stream: str, rows: int) -> tuple[range, bool]:
        """Numbers of a call's rows, and whether they are new."""
        if call.continues and not isinstance(call.cache, tuple | list):  # old caches are tuples: nothing can be kept by them
            held = self._of_cache.get(call.cache, {})
            if len(held.get(stream, ())) == rows:
                return held[stream], False
        return self.new(rows), True

    def new(self, rows: int) -> range:
        numbers = range(self.count, self.count + rows)
        self.count += rows
        return numbers

    def keep(self, cache: Any, stream: str, numbers: range) -> None:
        """Remember whose keys and values a cache holds."""
        if not isinstance(cache, tuple | list):
            self._of_cache.setdefault(cache, {})[stream] = numbers


def _matrix(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point() else None


def _mask(mask: Any, shape: Any) -> Tensor | None:
    """The part of an attention mask [B, seen so far] that is about the new tokens."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or shape is None or mask.shape[1] < shape[1]:
        return None
    return mask[:, -shape[1] :]


def _cached_tokens(cache: Any) -> int:
    """Tokens whose keys and values a cache already holds."""
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        return len(cache)
    cache = getattr(cache, "self_attention_cache", cache)
    measure = getattr(cache, "get_seq_length", None)
    try:
        return int(measure()) if measure is not None else 0
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return 0
