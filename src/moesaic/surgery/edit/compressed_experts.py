"""Compressed Experts: of a token's k experts the best few run, and learned vectors stand for the others."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.registry import register
from moesaic.models.hosted.classes import Retrofitted, become, config_class
from moesaic.models.hosted.install import COMPRESSED, Spec, install, own_router
from moesaic.surgery.objective import Batch, Given, Objective
from moesaic.view.block import View

TRAINS = ("vectors", "vectors+router", "all")


@register("edit", "compressed_experts", paper="2503.00634", card="surgery-and-steering.md#compressed-experts", exact=False)
class CompressedExperts(Objective):
    """The `main` experts of largest weight run on x * sum_e a_e theta_e, a the other experts' weights over their sum.

    theta starts at ones, which is plain top-`main` routing, and learns on a text without weight decay (it would pull
    theta towards 0). Shared experts see x. Options:

        main: experts that run; half of the model's k by default, which the paper found best.
        vectors: 1 (on the hidden state), or 3: one each for the inputs of gate, up and down. The paper describes the first;
            its parameter count for Phi-MoE fits the second.
        renormalise_main: divide the main weights by their sum; by default as the model does over its k.
        train: vectors, vectors+router or all (the paper's).
    """

    needs_text = False

    def __init__(
        self, main: int | None = None, vectors: int = 1, renormalise_main: bool | None = None, train: str = "vectors+router"
    ) -> None:
        if train not in TRAINS:
            raise BadInput(f"train={train!r}: one of {', '.join(TRAINS)}")
        if vectors not in (1, 3):
            raise BadInput(f"vectors={vectors}: 1, or 3 (gate, up and down)")
        self.main, self.vectors, self.renormalise_main, self.train = main, vectors, renormalise_main, train

    def plan(self, model: Any) -> dict[str, Any]:
        if isinstance(model, Retrofitted):
            raise BadInput("this model was retrofitted or compressed already: start from the one before")
        if not hasattr(model, "get_decoder") or model.get_decoder() is model:
            raise BadInput(f"{type(model).__name__} is no causal language model with a decoder")
        config_class(cast(Any, type(model.config)))
        blocks = View(model)
        for block in blocks:
            main = self._main(block.top_k)
            if not 1 <= main <= block.top_k:
                raise BadInput(f"main={main}: {block.name} runs {block.top_k} experts per token")
            if self.vectors == 3 and not _plain(block.bank):
                raise BadInput(f"vectors=3: the experts of {block.name} are not gate and up in one matrix without biases")
        dim, inner = blocks[0].bank.width, blocks[0].bank.peek(0)["up"].shape[0]
        added = sum(block.num_experts for block in blocks) * (dim + (dim + inner if self.vectors == 3 else 0))
        return {
            "stock": False,
            "reason": "the architecture has no vectors in the place of experts",
            "trains": {"vectors": "the vectors", "vectors+router": "the vectors and the routers"}.get(
                self.train, "all parameters"
            ),
            "parameters_added": added,
            "main": self._main(blocks[0].top_k),
        }

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.plan(model)
        blocks = View(model)
        options = {"main": self._main(blocks[0].top_k), "vectors": self.vectors, "renormalise_main": self._normalised(blocks)}
        spec = Spec(None, bank=COMPRESSED, bank_options=options, layers=[block.layer for block in blocks])
        spec.orders = [[] for _ in blocks]
        install(model, list(blocks), spec)
        become(model, spec.to_dict())
        if self.train == "all":
            return list(model.parameters())
        learn = [p for block in blocks for name, p in block.experts.named_parameters() if name.startswith("theta")]
        if self.train == "vectors+router":
            learn += [p for block in blocks if block.router is not None for p in block.router.parameters()]
        return learn

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return model(input_ids=batch["text"], labels=batch["text"], use_cache=False).loss

    def _main(self, k: int) -> int:
        return max(1, k // 2) if self.main is None else self.main

    def _normalised(self, blocks: View) -> int:
        """Whether main weights are divided by their sum: as given, else as the model treats its k."""
        if self.renormalise_main is not None:
            return int(self.renormalise_main)
        try:
            return int(own_router(blocks[0]).normalised)
        except (BadInput, MissingNeed):  # no softmax top-k: its configuration says it
            return int(bool(getattr(blocks[0].experts.config, "norm_topk_prob", False)))


def _plain(bank: Any) -> bool:
    return bank.gated and not bank.biased and not bank.transposed and not bank.interleaved
