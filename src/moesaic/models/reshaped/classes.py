"""Configuration and model classes of reshaped checkpoints: an architecture's own, with blocks of other sizes.

One `model_type`, "moesaic_surgery", says that stock transformers cannot load such a checkpoint; `base_model_type` says whose
architecture it is, and `surgery` what each block is. After `import moesaic` the auto classes load it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from moesaic.core.errors import BadInput

MODEL_TYPE = "moesaic_surgery"


class ReshapedConfig(PreTrainedConfig):
    """What AutoConfig knows; reading one gives an instance of the class of its architecture (`config_class`)."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("base_model_type")
        if not isinstance(kind, str) or not isinstance(config_dict.get("surgery"), dict):
            raise BadInput(f"config.json: a {MODEL_TYPE} checkpoint names base_model_type and surgery")
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise BadInput(f"config.json: base_model_type: transformers has no architecture {kind!r}")
        base: Any = CONFIG_MAPPING[kind]
        return config_class(base).from_dict(config_dict, **kwargs)


@cache
def config_class(base: Any) -> Any:
    """The configuration class of a reshaped `base`, known to AutoModelForCausalLM with its model."""
    fields = {"base_model_type": "str | None", "surgery": "dict | None"}
    body = {"model_type": MODEL_TYPE, "__annotations__": fields, "base_model_type": None, "surgery": None}
    made = type(f"Reshaped{base.__name__}", (base,), {**body, "__module__": __name__})
    from transformers import AutoModelForCausalLM

    if base not in AutoModelForCausalLM._model_mapping:
        raise BadInput(f"{base.model_type} is no causal language model: only those are loaded with blocks of unequal size")
    AutoModelForCausalLM.register(made, model_class(AutoModelForCausalLM._model_mapping[base], made))
    return made


class Reshaped:
    """Mixed in before the architecture's class: builds it, and gives its blocks their sizes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        from moesaic.models.reshaped.blocks import reshape

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        reshape(self, config.surgery["blocks"])

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return architecture_of(cls)._can_set_experts_implementation()  # transformers looks into the file of the class


def architecture_of(model_class: Any) -> Any:
    """The architecture's own class of a reshaped one; any other as it is."""
    mixed = next((each for each in model_class.__mro__ if Reshaped in each.__bases__), None)
    return model_class if mixed is None else mixed.__bases__[1]


@cache
def model_class(base: Any, config: Any) -> Any:
    return type(f"Reshaped{base.__name__}", (Reshaped, base), {"config_class": config, "__module__": __name__})


def reshaped_config(config: Any, blocks: dict[str, dict[str, Any]]) -> Any:
    """The configuration of a model with such blocks: name -> experts, rows, and `map` from rows to experts or None."""
    own: Any = type(config)
    values = config.to_dict()
    for name in ("model_type", "architectures"):
        values.pop(name, None)
    made = config_class(own)(**values)
    made.base_model_type, made.surgery = config.model_type, {"blocks": blocks}
    made.architectures = [f"Reshaped{_architecture(own).__name__}"]
    return made


def _architecture(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[config]
