"""Configuration and model classes of retrofitted checkpoints: an architecture's own, with the spec of what is put in.

One `model_type`, "moesaic_retrofit", says that stock transformers cannot load such a checkpoint; `base_model_type` says
whose architecture it is. After `import moesaic` the auto classes load it: the configuration class is made when a
configuration is read, and its model class is the architecture's own with the routers installed after it is built.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from transformers import PreTrainedConfig

from moesaic.core.errors import BadInput

MODEL_TYPE = "moesaic_retrofit"


class RetrofittedConfig(PreTrainedConfig):
    """What AutoConfig knows; reading one gives an instance of the class of its architecture (`config_class`)."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        kind = config_dict.get("base_model_type")
        if not isinstance(kind, str) or not isinstance(config_dict.get("retrofit"), dict):
            raise BadInput(f"config.json: a {MODEL_TYPE} checkpoint names base_model_type and retrofit")
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if kind not in CONFIG_MAPPING:
            raise BadInput(f"config.json: base_model_type: transformers has no architecture {kind!r}")
        base: Any = CONFIG_MAPPING[kind]
        return config_class(base).from_dict(config_dict, **kwargs)


@cache
def config_class(base: Any) -> Any:
    """The configuration class of a retrofitted `base`, known to AutoModelForCausalLM with its model."""
    fields = {"base_model_type": "str | None", "retrofit": "dict | None"}
    body = {"model_type": MODEL_TYPE, "__annotations__": fields, "base_model_type": None, "retrofit": None}
    made = type(f"Retrofitted{base.__name__}", (base,), {**body, "__module__": __name__})
    from transformers import AutoModelForCausalLM

    if base not in AutoModelForCausalLM._model_mapping:
        raise BadInput(f"{base.model_type} is no causal language model: a retrofit needs one")
    AutoModelForCausalLM.register(made, model_class(AutoModelForCausalLM._model_mapping[base], made))
    return made


class Retrofitted:
    """Mixed in before the architecture's class: builds it, installs the routers, adds balance losses in training."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        from moesaic.models.hosted.install import Spec, install_spec

        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        install_spec(self, Spec(**config.retrofit))

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """Build on real memory: routers draw tables when they are built, which `meta` cannot."""
        return [c for c in super().get_init_context(*args, **kwargs) if c != torch.device("meta")]  # type: ignore[misc]

    def _move_missing_keys_from_meta_to_device(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is on `meta`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        losses = self.balance_losses() if self.training and getattr(output, "loss", None) is not None else {}  # type: ignore[attr-defined]
        if losses:
            output.loss = output.loss + torch.stack(list(losses.values())).sum()
        return output

    def balance_losses(self) -> dict[str, torch.Tensor]:
        """Balance losses of the last forward by name, with their coefficients, summed over layers."""
        total: dict[str, torch.Tensor] = {}
        for routing in self._hosted_calls.routings.values():  # type: ignore[attr-defined]
            for key, value in routing.aux.items():
                if key.startswith("loss/"):
                    name = key.removeprefix("loss/")
                    total[name] = total[name] + value if name in total else value
        return total

    def after_step(self) -> None:
        """Call once after every optimiser step: schedules and bias controllers move."""
        from moesaic.models.hosted.install import hosted_routers

        for router in hosted_routers(self):  # type: ignore[arg-type]
            router.after_step()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Refused where routers hand state from layer to layer: a recomputed block would see another layer's."""
        from moesaic.models.hosted.install import hosted_routers

        if any("previous" in router.router.needs for router in hosted_routers(self)):  # type: ignore[arg-type]
            raise BadInput("gradient checkpointing: this model's routers hand state from layer to layer, which it would mix up")
        super().gradient_checkpointing_enable(*args, **kwargs)  # type: ignore[misc]


@cache
def model_class(base: Any, config: Any) -> Any:
    return type(f"Retrofitted{base.__name__}", (Retrofitted, base), {"config_class": config, "__module__": __name__})


def become(model: Any, retrofit: dict[str, Any]) -> None:
    """Turn a live model, whose routers are installed, into one that saves and loads as retrofitted."""
    config = model.config
    own: Any = type(config)
    made = config_class(own)
    config.base_model_type = config.model_type
    config.__class__ = made
    config.__dict__.pop("model_type", None)  # what was read from a file hides the class's own
    config.retrofit = retrofit
    model.__class__ = model_class(cast(Any, type(model)), made)
    model.__dict__.pop("_weight_conversions", None)  # of the checkpoint it came from; this class keeps experts stacked
