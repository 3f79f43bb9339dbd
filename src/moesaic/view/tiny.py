"""Tiny random models of every architecture that keeps its experts behind transformers' experts decorator.

A configuration is shrunk by what its fields are called (a width, a count, a token id), the same for all
architectures. `OVERRIDES` holds only what no such rule can know, each with its reason.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.view import discover

DECORATOR = "use_experts_implementation"
WIDTH, VOCAB, LAYERS, EXPERTS, HEADS = 32, 128, 4, 8, 4

Rule = Callable[[int], int]
RULES: list[tuple[str, Rule]] = [
    (r"vocab_size", lambda n: VOCAB),
    (r"layers?_(offset|start_index|interval)|(offset|step)$", lambda n: min(n, 1)),
    (r"layer_period$", lambda n: min(n, 2)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", lambda n: min(n, 1)),
    (r"layer_end_index", lambda n: LAYERS - 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers", lambda n: 0),
    (r"num_hidden_layers|^n_layers|^depth$|encoder_layers", lambda n: LAYERS),
    (r"experts_per_tok|top_k_experts|moe_k$|moe_topk", lambda n: min(n, 2)),
    (r"shared_experts$", lambda n: min(n, 1)),
    (r"num_(local_)?experts$|routed_experts$", lambda n: EXPERTS),
    (r"^n_group$|num_expert_group", lambda n: min(n, 2)),
    (r"topk_group", lambda n: min(n, 1)),
    (r"(key_value|kv)_heads", lambda n: min(n, 2)),
    (r"n_heads$|num_heads$|_heads$", lambda n: min(n, HEADS)),
    (r"head_dim$|_d_head$", lambda n: min(n, 8)),
    (r"lora_rank|_rank$", lambda n: min(n, 8)),
    (r"intermediate_size|ffn_dim|mlp_dim", lambda n: min(n, 16)),
    (r"hidden_size|d_model|_in_dim|_out_dim|output_dim|embed_dim|^scale$", lambda n: min(n, WIDTH)),
    (r"max_position_embeddings|max_source_positions", lambda n: min(n, 128)),
    (r"sliding_window|window_size", lambda n: min(n, 8)),
    (r"canvas_length|chunk_size|block_size|_topk$|kpool$", lambda n: min(n, 8)),
    (r"groups$", lambda n: min(n, 2)),
]
"""Field name pattern -> its tiny value, the first that matches; widths agree, so that towers and text models fit."""

UNSET = r"experts$|experts_per_tok|top_k_experts|moe_intermediate_size|^head_dim$"
"""Fields that a checkpoint always sets and a configuration class leaves at None."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 125},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "gemma4_text": {"enable_moe_block": True},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8],
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
    },
    "dots3_note_text": {
        "head_dim": 16,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4, 6, 8]},
}
"""Model type -> fields that a rule cannot know."""


class Architecture(NamedTuple):
    """One modelling file with experts: its folder under transformers.models and its experts classes."""

    name: str
    experts: tuple[str, ...]


@cache
def architectures() -> list[Architecture]:
    """Every modelling file of the installed transformers that decorates an experts class, by name."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@" + DECORATOR in source:
            found.append(Architecture(path.parent.name, tuple(_decorated(ast.parse(source)))))
    return found


def _decorated(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(DECORATOR in ast.unparse(d) for d in node.decorator_list):
            yield node.name


def model_classes(architecture: Architecture) -> list[type[PreTrainedModel]]:
    """The fewest model classes that together hold every kind of MoE block of the architecture.

    The first is the most complete that has a text-only call; the rest, for blocks it lacks (a vision tower's, a
    speech head's), are the smallest that have them.
    """
    module = importlib.import_module(f"transformers.models.{architecture.name}.modeling_{architecture.name}")
    skeletons = {}
    for value in vars(module).values():
        if not inspect.isclass(value) or not issubclass(value, PreTrainedModel) or value.__module__ != module.__name__:
            continue
        if value.__name__.endswith("PreTrainedModel") or not dataclasses.is_dataclass(value.config_class):
            continue
        try:
            with torch.device("meta"):
                skeletons[value] = value(tiny_config(value.config_class))
        except Exception:  # a part that cannot stand alone; what only it holds is reported as not covered
            continue
    kinds = {value: _block_kinds(model) for value, model in skeletons.items()}
    order = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification", "Model")
    ranked = sorted(skeletons, key=lambda v: next((i for i, end in enumerate(order) if v.__name__.endswith(end)), len(order)))
    chosen = [value for value in ranked if kinds[value]][:1]
    covered = {kind for value in chosen for kind in kinds[value]}
    for value in sorted(skeletons, key=lambda v: sum(p.numel() for p in skeletons[v].parameters())):
        if kinds[value] - covered:
            chosen.append(value)
            covered |= kinds[value]
    return chosen


def _block_kinds(model: PreTrainedModel) -> set[tuple[str, str]]:
    return {(type(found.parent).__name__, type(found.experts).__name__) for found in discover.find(model)}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration of this class small enough to build in milliseconds."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    tokens = 0
    for name, field in fields.items():
        default = field.default
        if name in config_class.sub_configs:
            sub_class: Any = config_class.sub_configs[name]
            if not dataclasses.is_dataclass(sub_class):  # AutoConfig: the class that it stands for by default
                sub_class = type(getattr(config_class(), name))
            if isinstance(sub_class, type) and dataclasses.is_dataclass(sub_class):
                values[name] = tiny_config(cast("type[PreTrainedConfig]", sub_class))
        elif default is None and re.search(UNSET, name) and "int" in str(field.type) and "list" not in str(field.type):
            values[name] = _shrink(name, 1 << 30)
        elif isinstance(default, tuple) and all(isinstance(n, int) for n in default):
            values[name] = [min(n, 16) for n in default]
        elif isinstance(default, bool) or not isinstance(default, int):
            continue
        elif re.search(r"_(token_)?(id|index)$", name) and "layer" not in name:
            tokens += 1
            values[name] = default if 0 <= default < 8 else VOCAB - 1 - tokens
        elif re.search("key_value_heads", name) and default == _default(fields, name.replace("key_value", "attention")):
            values[name] = HEADS
        else:
            values[name] = _shrink(name, default)
    if "initializer_range" in fields:
        values["initializer_range"] = 0.2  # with the usual 0.02, a tiny expert's output would drown in rounding
    values.update(OVERRIDES.get(config_class.model_type, {}))
    make: Any = config_class
    config = make(**values)
    types = _layer_types(config_class)
    if "layer_types" not in values and set(types) - set(getattr(config, "layer_types", None) or types):
        config = make(**values, layer_types=types)
    return config


def _layer_types(config_class: type[PreTrainedConfig]) -> list[str]:
    """Every kind of layer that the full-size configuration has, in as few layers; its last kind stays last."""
    full = getattr(config_class(), "layer_types", None) or []
    kinds = sorted(set(full), key=full.index)
    return [*[kinds[i % len(kinds)] for i in range(LAYERS - 1)], full[-1]] if 1 < len(kinds) <= LAYERS else []


def _shrink(name: str, value: int) -> int:
    for pattern, rule in RULES:
        if re.search(pattern, name):
            return rule(value)
    return value


def _default(fields: dict[str, Any], name: str) -> Any:
    return fields[name].default if name in fields else None


def build(model_class: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """A tiny random model in eval mode, with random correction biases and lookup tables in its routers."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(model_class.config_class)).eval()  # type: ignore[arg-type]
    for found in discover.find(model):
        _randomise(found.parent, found.experts)
        # Some classes leave these uninitialised or zero.
        matrices = [*found.experts.parameters(), *(found.router.parameters() if found.router is not None else [])]
        for matrix in matrices:
            if matrix.dim() >= 2:
                matrix.data.normal_(0, 0.2)
    return model


def _randomise(parent: Any, experts: Any) -> None:
    """A new model has zeros where training leaves biases and tables: give selection something to differ by."""
    num_experts = experts.down_proj.shape[0]
    for name, buffer in [*parent.named_buffers(), *parent.named_parameters()]:
        if "bias" in name and buffer.shape == (num_experts,) and buffer.is_floating_point():
            buffer.data.uniform_(-0.1, 0.1)
        elif not buffer.is_floating_point() and buffer.dim() == 2 and buffer.shape[1] <= num_experts:
            buffer.copy_(torch.rand(buffer.shape[0], num_experts).argsort(1)[:, : buffer.shape[1]])


def inputs(model: PreTrainedModel, seed: int = 1, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Arguments for one forward call, by the names that it takes."""
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    ids = torch.randint(8, 80, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "inputs_embeds" in accepted and not model.can_generate():  # a part of a model: what comes before it embeds
        del given["input_ids"]
        given["inputs_embeds"] = torch.randn(batch, length, model.config.hidden_size, generator=generator)
    if "moe_mm_token_type_ids" in accepted:
        given["moe_mm_token_type_ids"] = (torch.arange(length) % 3 == 1).long().expand(batch, -1)
    if "decoder_input_ids" in accepted:
        given["decoder_input_ids"] = torch.randint(8, 80, (batch, model.config.canvas_length), generator=generator)
    if "input_ids" not in accepted and "grid_thw" in accepted:
        config = model.config
        width = config.num_channels * config.patch_size**2
        given["pixel_values"] = torch.randn(16, width, generator=generator)
        given["grid_thw"] = torch.tensor([[1, 4, 4]])
    return {name: value for name, value in given.items() if name in accepted}
