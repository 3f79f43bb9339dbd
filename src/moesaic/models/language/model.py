"""The reference language model: attention and registered MoE layers over tied embeddings, as a transformers model.

It gives a router everything that a router may need (`build.HOST`), so that each runs in the same model. Causal (next
token) or, with `causal=False`, masked (every seventh token is hidden and to be guessed).

Shape legend: B batch, N tokens of a call, T = B * N, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.models.language import build
from moesaic.models.language.attention import Attention, Look, Mixes, turns
from moesaic.models.language.calls import CallInputs, real_tokens
from moesaic.models.language.config import PER_CALL, MoesaicConfig
from moesaic.models.language.loss import balance_losses, hide, language_loss
from moesaic.routing.router import Router


@dataclass
class MoesaicModelOutput(ModelOutput):
    """Final hidden states [B, N, D] and the Routing of every MoE layer, from the first."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    routings: tuple[Routing, ...] | None = None


@dataclass
class MoesaicOutput(ModelOutput):
    """`loss` holds `balance_losses` (by name, summed over layers, with their coefficients); `routings` when asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    routings: tuple[Routing, ...] | None = None
    balance_losses: dict[str, Tensor] | None = None


class Block(nn.Module):
    """x + attention(norm x), then x + layer(norm x), and x + dense(norm x) beside it where the model has that branch."""

    def __init__(self, config: MoesaicConfig, index: int, sparse: bool, shared: dict[str, nn.Module]):
        super().__init__()
        self.index = index
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe = build.moe_layer(config, index, shared) if sparse else None
        self.mlp = build.dense_layer(config) if not sparse or config.parallel_dense else None
        self.attention = Attention(config, index)
        self._said: tuple[list[nn.Module | None], frozenset[str], str] = ([], frozenset(), "")

    def _says(self) -> tuple[list[nn.Module | None], frozenset[str], str]:
        """What the layer and its routers say of themselves; asked again when the layer was replaced, not in every call."""
        if self._said[0] != [self.moe]:
            known = (frozenset(), "") if self.moe is None else (build.needs_of(self.moe), build.why_no_cache(self.moe))
            self._said = ([self.moe], *known)
        return self._said

    @property
    def needs(self) -> frozenset[str]:
        """Everything that the layer and its routers ask of their host."""
        return self._says()[1]

    @property
    def no_cache(self) -> str:
        """Why the layer cannot decode one token at a time; empty when it can."""
        return self._says()[2]

    def forward(
        self,
        x_BND: Tensor,
        ctx: RoutingContext,
        turn: tuple[Tensor, Tensor],
        look: Look,
        cache: Cache | None,
        mixes: Mixes,
        seed: int | None,
    ) -> tuple[Tensor, Routing | None]:
        if self.moe is None or not getattr(self.moe, "attends", False):
            y_BND, mix = self.attention(self.attention_norm(x_BND), turn, look, cache, mixes)
            x_BND, ctx = x_BND + y_BND, ctx.replace(attention=mix)
        h_BND, routing = self.norm(x_BND), None
        dense_BND = None if self.mlp is None else self.mlp(h_BND)
        if self.moe is not None:
            if seed is not None:  # made here, so that a recomputed block draws the same numbers again
                ctx = ctx.replace(generator=torch.Generator(x_BND.device).manual_seed(seed + self.index))
            y_BND, routing = self.moe(x_BND if getattr(self.moe, "own_norm", False) else h_BND, ctx)
            x_BND = x_BND + y_BND if getattr(self.moe, "residual", True) else y_BND
        return x_BND if dense_BND is None else x_BND + dense_BND, routing


class MoesaicPreTrainedModel(PreTrainedModel):
    config_class = MoesaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _can_record_outputs = {"router_logits": Router}  # noqa: RUF012
    _can_set_experts_implementation_cached_value = True  # the bank's `kernel` option chooses what runs it

    def _init_weights(self, module: Any) -> None:
        """Routers and banks start as their papers say, when they are built; only what is ours is drawn here."""
        std = getattr(module, "init_std", None)
        if std is not None:
            from transformers import initialization

            initialization.normal_(module.weight, std=std)

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """Build on real memory: routers draw tables and draw from generators when they are built, which `meta` cannot."""
        return [c for c in super().get_init_context(*args, **kwargs) if c != torch.device("meta")]

    def _move_missing_keys_from_meta_to_device(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is on `meta`: what a checkpoint does not hold keeps the numbers that its constructor gave it."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Without reentrance: balance losses reach the router through the routing, which a reentrant checkpoint cuts off."""
        asked = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if asked["use_reentrant"]:
            raise BadInput("gradient checkpointing with use_reentrant=True cuts balance losses off from the router: use False")
        enable = getattr(self, "_activation_checkpointing_enable", None) or super().gradient_checkpointing_enable
        enable(asked, **kwargs)


class MoesaicModel(MoesaicPreTrainedModel):
    """`model(input_ids=..., attention_mask=...)` -> MoesaicModelOutput.

    Raises BadInput or MissingNeed at construction for a router, bank or layer that this host cannot serve.
    """

    def __init__(self, config: MoesaicConfig):
        super().__init__(config)
        dim, layers = config.hidden_size, config.num_hidden_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        shared, sparse = build.shared_modules(config), set(config.moe_layers())
        self.shared = nn.ModuleDict(shared)
        self.layers = nn.ModuleList(Block(config, i, i in sparse, shared) for i in range(layers))
        self.norm = nn.RMSNorm(dim, config.rms_norm_eps)
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.gradient_checkpointing = False
        std = config.initializer_range or dim**-0.5
        _set_std(self.embed_tokens, std)
        for block in self.blocks:
            for name, part in block.attention.named_children():
                # As wide as nn.Linear's own start; what adds to the stream shrinks with the number of additions.
                _set_std(part, std * (3**-0.5) * ((2 * layers) ** -0.5 if name == "o_proj" else 1.0))
        self._tied_weights_keys = self._shared_tensors()
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Whatever the embeddings do, modules that layers share stay shared."""
        return super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys or {})

    def _shared_tensors(self) -> dict[str, str]:
        """Further names of tensors that layers share -> first name, the one in the file."""
        first: dict[int, str] = {}
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        return {name: source for name, tensor in tensors if (source := first.setdefault(id(tensor), name)) != name}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(name for block in self.blocks for name in block.needs)

    @property
    def no_cache(self) -> str:
        """Why this model cannot decode with a cache: the first layer's reason; empty when it can."""
        return next((block.no_cache for block in self.blocks if block.no_cache), "")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        task_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        language_ids: Tensor | None = None,
        class_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        **kwargs: Any,
    ) -> MoesaicModelOutput:
        """`attention_mask` [B, past + N], 1 for real tokens; `task_ids` and its like [B] or [B, N]."""
        given = dict(zip(PER_CALL, (task_ids, modality_ids, language_ids, class_ids, timesteps), strict=True))
        x_BND = self._embedded(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        call = CallInputs.of(input_ids, x_BND, attention_mask, position_ids, past)
        look = Look.of(self.config.causal, call.mask_BM, call.length, past, x_BND.device)
        turn = turns(call.position_BN, self.config.head_dim, self.config.rope_theta, x_BND.dtype)
        ctx = call.context("train" if self.training else "eval", self.config.causal, given, self._step(), self.needs)
        mixes, seed = Mixes(cache, self.config.num_hidden_layers), self._seed()
        routings: list[Routing] = []
        for block in self.blocks:
            last = routings[-1] if routings else None
            ctx = ctx.replace(
                layer=block.index,
                previous=None if last is None else last.state,
                carry={} if last is None or last.carry is None else last.carry,
                memo={},
            )
            arguments = (x_BND, ctx, turn, look, cache, mixes, seed)
            if self.gradient_checkpointing and self.training:
                x_BND, routing = self._gradient_checkpointing_func(block, *arguments)
            else:
                x_BND, routing = block(*arguments)
            routings += [] if routing is None else [routing]
        return MoesaicModelOutput(self.norm(x_BND), cache, tuple(routings))

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise BadInput("give input_ids or inputs_embeds, one of them")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache to fill. A router that cannot decode with one is refused here, not silently wrong."""
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and (not wanted or not self.config.causal or (self.gradient_checkpointing and self.training)):
            return None
        reason = self.no_cache
        if reason:
            if cache is None and use_cache is None:
                return None
            raise BadInput(f"this model cannot decode with a cache: {reason}; pass use_cache=False")
        return DynamicCache(config=self.config) if cache is None else cache

    def _step(self) -> int | None:
        """Optimiser steps done. Read only when someone asks, for reading it stops a compiled graph."""
        return int(self.step) if "step" in self.needs else None

    def _seed(self) -> int | None:
        """Seed of this forward's generators: drawn from torch's own stream in training, fixed in evaluation."""
        if "generator" not in self.needs:
            return None
        return int(torch.randint(2**40, ())) if self.training else 0

    def after_step(self) -> None:
        """Call once after every optimiser step: the step advances, controllers move."""
        self.step += 1
        for block in self.blocks:
            if block.moe is not None:
                block.moe.after_step()  # type: ignore[operator]


class MoesaicForCausalLM(MoesaicPreTrainedModel, GenerationMixin):
    """The language model with its head: `loss` when labels are given, `generate` when causal."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: MoesaicConfig):
        super().__init__(config)
        self.model = MoesaicModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        _set_std(self.lm_head, config.initializer_range or config.hidden_size**-0.5)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routings: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        task_ids: Tensor | None = None,
        modality_ids: Tensor | None = None,
        language_ids: Tensor | None = None,
        class_ids: Tensor | None = None,
        timesteps: Tensor | None = None,
        **kwargs: Any,
    ) -> MoesaicOutput:
        """`labels` [B, N], -100 where nothing is scored; causal ones are shifted here. See MoesaicModel.forward."""
        config = self.config
        if labels is not None and not config.causal:
            if input_ids is None:
                raise BadInput("a masked model hides input_ids: give those, not inputs_embeds")
            input_ids, labels = hide(input_ids, labels, real_tokens(attention_mask), int(self.model.step), config.mask_token_id)
        given = dict(zip(PER_CALL, (task_ids, modality_ids, language_ids, class_ids, timesteps), strict=True))
        if labels is not None:
            use_cache = False
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **given)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss, balance = None, None
        if labels is not None:
            balance = balance_losses(out.routings)
            loss = language_loss(logits, labels, balance, config.causal, num_items_in_batch)
        return MoesaicOutput(loss, logits, out.past_key_values, out.routings if output_routings else None, balance)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own. A router that cannot decode with a cache sees the whole sequence again for every token."""
        if not self.config.causal:
            raise BadInput("a masked model (causal=False) guesses hidden tokens; it does not generate")
        if self.model.no_cache:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """New tokens carry on with the last token's task, language, ... when those were given per token."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        length = (inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]).shape[1]
        for name in PER_CALL:
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.dim() == 2:
                beyond = value[:, -1:].expand(-1, max(0, input_ids.shape[1] - value.shape[1]))
                inputs[name] = torch.cat([value, beyond], 1)[:, -length:]
        return inputs

    def after_step(self) -> None:
        """Call once after every optimiser step; `MoesaicCallback` does it in transformers' Trainer."""
        self.model.after_step()


def _set_std(module: Any, std: float) -> None:
    module.init_std = std
