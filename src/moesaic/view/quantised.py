"""What a quantised checkpoint needs to be loaded widened: its weights in the model's dtype, as if they were stored so."""

from __future__ import annotations

from typing import Any

from moesaic.core.errors import BadInput


def widening(config: dict[str, Any], source: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a checkpoint of that config.json; none where it is not quantised.

    Raises BadInput for a format other than fp8 with a scale per block.
    """
    given = config.get("quantization_config")
    if not given:
        return {}
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method != "fp8":
        raise BadInput(
            f"{source} is quantised ({method}): experts stream and pack from bfloat16, float16, float32, and from fp8 with "
            "weight_scale_inv"
        )
    from transformers import FineGrainedFP8Config

    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}
