"""Traces to and from the routed-experts arrays that vLLM and SGLang return with a request.

Both give, per request, an array [tokens, layers, slots] of the prompt and of all but the last token of the answer, with a
slice for every hidden layer; a layer without experts holds zeros. vLLM puts a NumPy array on `outputs[i].routed_experts`,
SGLang the same as base64 of int32 in `meta_info["routed_experts"]`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.trace.file import Header, Trace, TraceLayer, from_arrays
from moesaic.trace.join import runs_of


def from_vllm(outputs: Iterable[Any], experts: int, *, moe_layers: Sequence[int] | None = None, model: str = "") -> Trace:
    """From vLLM's `RequestOutput`s, or from plain arrays [tokens, layers, slots], one per request.

    `experts` is E of the model. `moe_layers` names the layers that have experts; without it, layers that are zero
    everywhere are taken for dense (top-1 models must name them). Raises BadInput for a request without the array.
    """
    arrays, prompts, tokens = [], [], []
    for number, output in enumerate(outputs):
        if isinstance(output, np.ndarray):
            arrays.append(output)
            prompts.append(len(output))
            continue
        for answer in output.outputs:
            if getattr(answer, "routed_experts", None) is None:
                raise BadInput(f"request {number} has no routed_experts: start vLLM with enable_return_routed_experts=True")
            arrays.append(np.asarray(answer.routed_experts))
            prompts.append(len(output.prompt_token_ids))
            tokens.append([*output.prompt_token_ids, *answer.token_ids][: len(arrays[-1])])
    return _together(arrays, prompts, tokens, experts, moe_layers, model)


def from_sglang(
    responses: Iterable[Any],
    layers: int,
    top_k: int,
    experts: int,
    *,
    moe_layers: Sequence[int] | None = None,
    model: str = "",
) -> Trace:
    """From SGLang's responses (their `meta_info`), or from the base64 strings alone.

    `layers` are all hidden layers, `top_k` the slots. Raises BadInput for a response without the string, or one whose bytes
    do not divide into layers and slots.
    """
    arrays, prompts = [], []
    for number, response in enumerate(responses):
        text = response if isinstance(response, str) else response.get("meta_info", response).get("routed_experts")
        if text is None:
            raise BadInput(f"response {number} has no routed_experts: ask with return_routed_experts=true")
        try:
            ids = np.frombuffer(base64.b64decode(text, validate=True), "<i4")
            arrays.append(ids.reshape(-1, layers, top_k))
        except (binascii.Error, ValueError) as error:
            raise BadInput(f"response {number}: routed_experts is no array of {layers} layers and {top_k} slots") from error
        known = None if isinstance(response, str) else response.get("meta_info", {}).get("prompt_tokens")
        prompts.append(len(arrays[-1]) if known is None else int(known))
    return _together(arrays, prompts, [], experts, moe_layers, model)


def to_vllm(trace: Trace, hidden_layers: int | None = None) -> list[np.ndarray]:
    """One int32 array [tokens, layers, slots] per sequence; empty slots are -1.

    With `hidden_layers`, layers stand at the numbers in their names and the dense ones between them are zeros.
    """
    from moesaic.view.discover import layer_of

    ids_TLK = np.asarray(trace.experts_TLK).astype(np.int32)
    ids_TLK[ids_TLK == trace.empty] = -1
    if hidden_layers is not None:
        places = [layer_of(layer.name) for layer in trace.layers]
        if len(set(places)) < len(places) or max(places) >= hidden_layers:
            raise BadInput(f"{trace.name}: its layers {places} do not fit {hidden_layers} hidden layers")
        spread = np.zeros((len(trace), hidden_layers, trace.top_k), np.int32)
        spread[:, places] = ids_TLK
        ids_TLK = spread
    return np.split(ids_TLK, trace.starts_S1[1:-1])


def to_sglang(trace: Trace, hidden_layers: int | None = None) -> list[str]:
    """One base64 string of little-endian int32 per sequence, as SGLang sends it."""
    return [base64.b64encode(np.ascontiguousarray(ids, "<i4").tobytes()).decode() for ids in to_vllm(trace, hidden_layers)]


def _together(
    arrays: list[np.ndarray],
    prompts: list[int],
    tokens: list[list[int]],
    experts: int,
    moe_layers: Sequence[int] | None,
    model: str,
) -> Trace:
    if not arrays:
        raise BadInput("no requests: nothing to make a trace of")
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1 or len(arrays[0].shape) != 3:
        raise BadInput(f"routed-experts arrays must all be [tokens, layers, slots], given {sorted(map(str, shapes))}")
    ids_TLK = np.concatenate(arrays).astype(np.int64)
    if moe_layers is None:
        moe_layers = np.flatnonzero(ids_TLK.any((0, 2))).tolist()
    if not moe_layers or max(moe_layers) >= ids_TLK.shape[1]:
        raise BadInput(
            f"moe_layers {list(moe_layers)}: the arrays have {ids_TLK.shape[1]} layers, with no expert but 0 in others"
        )
    ids_TLK = ids_TLK[:, list(moe_layers)]
    if ids_TLK.max() >= experts:
        raise BadInput(f"expert {ids_TLK.max()} in the arrays, but the model has {experts}")
    header = Header(tuple(TraceLayer(f"layers.{i}", experts, ids_TLK.shape[2]) for i in moe_layers), model)
    lengths = [len(array) for array in arrays]
    known = np.concatenate(tokens) if len(tokens) == len(arrays) else None
    trace = from_arrays(ids_TLK, experts, lengths=lengths, tokens_T=known, header=header)
    # A prompt is one step; every token after it is a step of its own.
    steps, first = [], 0
    for length, prompt in zip(lengths, prompts, strict=True):
        within = np.maximum(np.arange(length) - min(prompt, length) + 1, 0)
        steps.append(first + within)
        first += int(within[-1]) + 1 if length else 0
    return Trace(header, {**trace.columns, "runs": runs_of(trace.sequence_T, np.concatenate(steps))})
