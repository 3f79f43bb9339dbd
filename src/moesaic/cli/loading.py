"""MODEL on the command line to a model and its tokenizer, with errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from moesaic.core.errors import BadInput, NotMoE


class Opened(NamedTuple):
    model: Any
    tokenizer: Any
    source: str | Path
    """The folder it came from, or its hub id."""
    rounding: Any = None
    """What was rounded while loading (serving/rounding.py)."""


def quiet_transformers() -> None:
    """Progress and advice of transformers would land between our lines; its errors still raise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_model(
    name: str, dtype: str, *, experts: str = "moesaic", dense_ok: bool = False, trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Opened:  # fmt: skip
    """Model and tokenizer of a folder, a hub id or `bundled`. Raises BadInput, or NotMoE unless `dense_ok`.

    `quantize`: a recipe of view/quantize.py that needs no importance.
    """
    if any(c.isspace() for c in name) and not Path(name).exists():
        raise BadInput(f'no model {name!r}; MODEL comes before the prompt: moesaic run bundled "{name}"')
    quiet_transformers()
    from moesaic.view import load, resolve_model
    from moesaic.view.quick import quicken

    source = resolve_model(name)
    try:
        model, tokenizer = load(source, dtype=dtype, experts=experts, dense_ok=dense_ok, trust_remote_code=trust_remote_code)
    except NotMoE as error:
        raise NotMoE(f"{name} is not a Mixture-of-Experts model ({error}): pass --dense-ok to run it anyway") from error
    if tokenizer is None:
        raise BadInput(f"{name} has no tokenizer: put its tokenizer files beside config.json")
    rounding = None
    if quantize is not None:
        from moesaic.serving.rounding import rounding_in_memory
        from moesaic.view.quantize import parse, quantize_model

        recipe = parse(quantize)
        if recipe.mixed:
            raise BadInput(
                f"--quantize {quantize}: mixed widths take an importance: `moesaic pack --bits`, and run that folder"
            )
        rounding = rounding_in_memory(quantize_model(model, recipe), recipe)
    if experts == "moesaic":  # not when transformers' own code is asked for
        quicken(model)
    return Opened(model, tokenizer, source, rounding)


def open_streamed(name: str, dtype: str, *, trust_remote_code: bool = False, **how: Any) -> tuple[Opened, Any]:
    """`open_model`, with the experts left on disk, and what serves them. `how`: see `serving.streamed.load_streamed`."""
    quiet_transformers()
    from moesaic.serving.streamed import load_streamed
    from moesaic.view import resolve_model
    from moesaic.view.quick import quicken

    streamed = load_streamed(name, dtype=dtype, trust_remote_code=trust_remote_code, **how)
    if streamed.tokenizer is None:
        streamed.close()
        raise BadInput(f"{name} has no tokenizer: put its tokenizer files beside config.json")
    quicken(streamed.model)  # as the resident one, whose numbers these are
    return Opened(streamed.model, streamed.tokenizer, resolve_model(name)), streamed


def streaming(
    memory: str | None,
    resident: float | None,
    policy: str,
    page_cache: str,
    experts: str = "moesaic",
    others: dict[str, bool] | None = None,
    *,
    lossy: str | None = None,
    prefetch_bytes: str | None = None,
    device: str | None = None,
    device_memory: str | None = None,
    device_policy: str = "lru",
) -> dict[str, Any] | None:
    """How to stream, None where the model is to be loaded whole. `others`: options that only streaming has, and whether given.

    Raises BadInput for options that do not go together.
    """
    if memory is not None and resident is not None:
        raise BadInput(f"give --memory {memory} or --resident {resident:g}, not both")
    if (device is None) != (device_memory is None):
        raise BadInput("--device and --device-memory go together: where experts are computed, and what they may take there")
    if device_policy != "lru" and device is None:
        raise BadInput(f"--device-policy {device_policy} is about experts on a device: give --device and --device-memory")
    if memory is None and resident is None and device is not None:
        resident = 1.0
    if memory is None and resident is None:
        given = {"--policy": policy != "lru", "--page-cache": page_cache != "direct", **(others or {})}
        given |= {"--lossy": lossy is not None, "--prefetch-bytes": prefetch_bytes is not None}
        for option, is_given in given.items():
            if is_given:
                raise BadInput(f"{option} is about experts on disk: give --memory or --resident with it")
        return None
    if experts != "moesaic":
        raise BadInput(f"--experts {experts} needs all experts in memory: streamed ones run on moesaic's kernels")
    if page_cache not in ("direct", "keep", "drop"):
        raise BadInput(f"--page-cache {page_cache!r}: one of direct, keep, drop")
    if resident is not None and not 0 < resident <= 1:
        raise BadInput(f"--resident {resident:g}: give a share above 0, at most 1")
    from moesaic.core.sizes import parse_bytes

    if memory is not None and parse_bytes(memory, "--memory") <= 0:
        raise BadInput(f"--memory {memory}: give more than 0 bytes")
    above = {"device": device, "device_memory": device_memory, "device_policy": device_policy} if device is not None else {}
    return {
        **above,
        "memory": memory,
        "resident": resident,
        "policy": policy,
        "page_cache": page_cache,
        "lossy": lossy,
        "prefetch_bytes": None if prefetch_bytes is None else parse_bytes(prefetch_bytes, "--prefetch-bytes"),
    }
