"""A live model whose experts became factors, as one that can be saved: configuration and class of `models/reshaped/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.models.reshaped.classes import MODEL_TYPE, reshaped_config
from moesaic.view.block import View


def recast(model: Any, forms: Mapping[str, Mapping[str, Any]]) -> Any:
    """The model itself, in place. `forms`: name of each MoE block -> its form (models/reshaped/factored.py).

    A model whose rows share experts keeps its maps. Raises BadInput for one that is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    own, known = model.config, {}
    if own.model_type == MODEL_TYPE:
        known = own.surgery["blocks"]
        values = {k: v for k, v in own.to_dict().items() if k not in ("model_type", "surgery", "base_model_type")}
        own = type(own).__mro__[1](**values)
    specs = {}
    for block in View(model):
        rows = block.num_experts
        spec = known.get(block.name, {"experts": rows, "rows": rows, "map": None})
        specs[block.name] = {**spec, "form": forms[block.name]}
    config = reshaped_config(own, specs)
    model.__class__ = AutoModelForCausalLM._model_mapping[type(config)]
    model.config = config
    model.__dict__.pop("_weight_conversions", None)  # of the checkpoint that it was read from: names are its own now
    return model
