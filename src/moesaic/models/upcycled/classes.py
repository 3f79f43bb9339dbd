"""Configuration and model classes of checkpoints that upcycling made of a dense architecture and parts of ours.

One `model_type`, "moesaic_upcycled", says that stock transformers cannot load such a checkpoint; `base_model_type` says whose
architecture it is, and `upcycle` what was put in: `method` (a module of this package with `install(model, spec)`), its sizes.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from moesaic.core.errors import BadInput

MODEL_TYPE = "moesaic_upcycled"
METHODS = ("bam", "read_me", "twin_merging")


class UpcycledConfig(PreTrainedConfig):
    """What AutoConfig knows; reading one gives an instance of the class of its architecture (`config_class`)."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("base_model_type")
        if not isinstance(kind, str) or not isinstance(config_dict.get("upcycle"), dict):
            raise BadInput(f"config.json: a {MODEL_TYPE} checkpoint names base_model_type and upcycle")
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise BadInput(f"config.json: base_model_type: transformers has no architecture {kind!r}")
        base: Any = CONFIG_MAPPING[kind]
        return config_class(base).from_dict(config_dict, **kwargs)


@cache
def config_class(base: Any) -> Any:
    """The configuration class of an upcycled `base`, known to AutoModelForCausalLM with its model."""
    fields = {"base_model_type": "str | None", "upcycle": "dict | None"}
    body = {"model_type": MODEL_TYPE, "__annotations__": fields, "base_model_type": None, "upcycle": None}
    made = type(f"Upcycled{base.__name__}", (base,), {**body, "__module__": __name__})
    from transformers import AutoModelForCausalLM

    if base not in AutoModelForCausalLM._model_mapping:
        raise BadInput(f"{base.model_type} is no causal language model")
    AutoModelForCausalLM.register(made, model_class(AutoModelForCausalLM._model_mapping[base], made))
    return made


class Upcycled:
    """Mixed in before the architecture's class: builds it, puts the parts in, adds their losses in training."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        method = config.upcycle.get("method")
        if method not in METHODS:
            raise BadInput(f"config.json: upcycle.method {method!r}: one of {', '.join(METHODS)}")
        importlib.import_module(f"moesaic.models.upcycled.{method}").install(self, config.upcycle)

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """Build on real memory: parts set buffers when they are built, which `meta` cannot."""
        return [c for c in super().get_init_context(*args, **kwargs) if c != torch.device("meta")]  # type: ignore[misc]

    def _move_missing_keys_from_meta_to_device(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is on `meta`."""

    around_call: Any = None
    """around_call(args, kwargs) -> a context in which the call runs."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.around_call is None else self.around_call(args, kwargs):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        losses = self.balance_losses() if self.training and getattr(output, "loss", None) is not None else {}  # type: ignore[attr-defined]
        if losses:
            output.loss = output.loss + torch.stack(list(losses.values())).sum()
        return output

    def balance_losses(self) -> dict[str, torch.Tensor]:
        """Losses that the parts left in the last forward, with their coefficients, by module."""
        found = {}
        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if getattr(module, "losses", None):
                found[name] = torch.stack(list(module.losses.values())).sum()
        return found


@cache
def model_class(base: Any, config: Any) -> Any:
    return type(f"Upcycled{base.__name__}", (Upcycled, base), {"config_class": config, "__module__": __name__})


def upcycled_config(config: Any, spec: dict[str, Any]) -> Any:
    """The configuration of a dense architecture with `spec` put in."""
    own: Any = type(config)
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    made = config_class(own)(**values)
    made.base_model_type, made.upcycle = config.model_type, spec
    from transformers import AutoModelForCausalLM

    kinds: Any = AutoModelForCausalLM._model_mapping
    made.architectures = [f"Upcycled{kinds[own].__name__}"]
    return made
