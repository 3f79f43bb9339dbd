"""SDM: answer only prompts that lie within what was learnt, by similarity, distance and magnitude."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.files import replacing
from moesaic.core.registry import register
from moesaic.steering.kept import kept
from moesaic.steering.sdm_model import Adaptor, Calibrated, Distances, Fitted, Support
from moesaic.steering.steer import Steer
from moesaic.view.course import Course

KEY = "moesaic_sdm"


@register(
    "steering", "sdm", paper="2502.20167", exact=False,
    card="surgery-and-steering.md#similarity-distance-magnitude-sdm-activation-calibration-and-admission",
)  # fmt: skip
class Sdm(Steer):
    """A verdict on each prompt before it is answered, from the last hidden state of its last token: the class, whether it is
    admitted, q and d. What is not admitted gets no answer, or with `abstain=False` only the note. Weights, routing and the
    text of admitted prompts are untouched.

    `store`: a file of `write_store`, made from `calibrate` (steering/sdm_model.py) over `features` of labelled prompts.
    Activation, calibration and admission follow the card; its extension, an LM head with two logit vectors, is
    `sdm_network`. The exact search costs n M per prompt.
    """

    files: ClassVar[frozenset[str]] = frozenset({"store"})

    def __init__(self, store: str, abstain: bool = True) -> None:
        self.rule, self.names = kept(read_store, store)
        self.abstain = abstain

    def check(self) -> None:
        width = self.rule.fitted.net.adapt.in_features
        own = self.model.get_input_embeddings().embedding_dim
        if width != own:
            raise BadInput(f"sdm: the store is about features of width {width}, this model's are {own}: make it again")

    def start(self, prompt_ids: Sequence[int]) -> Course:
        with torch.inference_mode(False), torch.no_grad():
            verdict = self.rule.judge(features(self.model, prompt_ids)[None])
        name = self.names[int(verdict.predicted_m[0])]
        note = {
            "class": name,
            "admitted": bool(verdict.admitted_m[0]),
            "probability_lower": float(verdict.p_lower_m[0]),
            "similarity": float(verdict.q_m[0]),
            "distance": float(verdict.d_m[0]),
        }
        refused = None
        if self.abstain and not note["admitted"]:
            refused = (
                f"the prompt lies outside what this model was verified on (nearest: {name}, distance {note['distance']:.2f})"
            )
        return Course(notes={"sdm": note}, refused=refused)


@torch.no_grad()
def features(model: Any, ids: Sequence[int]) -> Tensor:
    """The last hidden state of the last token, [D] in float32."""
    given = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    return model(input_ids=given, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1].float().cpu()


def write_store(path: str | Path, rule: Calibrated, names: Sequence[str]) -> Path:
    """A calibrated rule and the names of its classes in one safetensors file."""
    fitted, support = rule.fitted, rule.fitted.support
    tensors = {f"net.{name}": value.contiguous() for name, value in fitted.net.state_dict().items()}
    tensors |= {"h": support.h_nM, "label": support.label_n, "predicted": support.predicted_n}
    for what, parts in (("distance", fitted.distances.sorted), ("quantile", rule.quantiles), ("rescaled", rule.rescaled)):
        tensors |= {f"{what}.{c}": part for c, part in enumerate(parts)}
    tensors |= {"weight": rule.weight_CC, "floor": rule.floor_C, "offset": rule.offset_C}
    header = {"names": list(names), "alpha": rule.alpha, "counts": rule.counts, "least": rule.least, "balance": fitted.balance}
    with replacing(path) as scratch:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, scratch, {KEY: json.dumps(header)})
    return Path(path)


def read_store(path: str | Path) -> tuple[Calibrated, list[str]]:
    """Raises BadInput for a file that is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = header["names"]
        net = Adaptor(tensors["net.adapt.weight"].shape[1], tensors["net.adapt.weight"].shape[0], len(names))
        net.load_state_dict({name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")})
        parts = {what: [tensors[f"{what}.{c}"] for c in range(len(names))] for what in ("distance", "quantile", "rescaled")}
        rule = Calibrated.__new__(Calibrated)
        support = Support(tensors["h"], tensors["label"], tensors["predicted"])
        rule.fitted = Fitted(net, support, Distances.of(parts["distance"]), len(names), header["balance"])
        rule.alpha, rule.classes, rule.counts, rule.least = header["alpha"], len(names), header["counts"], header["least"]
        rule.quantiles, rule.rescaled, rule.weight_CC = parts["quantile"], parts["rescaled"], tensors["weight"]
        rule.floor_C, rule.offset_C = tensors["floor"], tensors["offset"]
        return rule, names
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"{path}: no SDM store ({error})") from error
