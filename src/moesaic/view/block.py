"""View: the MoE blocks of a model. Block: one of them, to read, replace, route and hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from moesaic.core.errors import BadInput, NotMoE
from moesaic.core.routing import Routing
from moesaic.view import discover, implementation, shared_rows, tap
from moesaic.view.bank import ViewBank
from moesaic.view.policy import Policy, resolve
from moesaic.view.rerun import ids_at


@dataclass(frozen=True)
class Kind:
    """How a block stores and computes its experts."""

    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    own_gate: bool
    """The architecture brings its own gate (clamped, scaled) instead of act(gate) * up."""
    post_norm: bool
    act: str

    def __str__(self) -> str:
        flags = [name for name in ("biased", "transposed", "interleaved", "own_gate", "post_norm") if getattr(self, name)]
        return " ".join(filter(None, ["gated" if self.gated else "plain", self.act, *flags]))


class Block:
    """One MoE block. `name` is dotted, `layer` its number, `bank` its experts; see `route`, `on_route`, `on_experts`."""

    def __init__(self, found: discover.Found, view_key: int, index: int) -> None:
        self.name, self.layer = found.name, found.layer
        self.parent: Any = found.parent
        self.experts: Any = found.experts
        self.router: Any = found.router
        self.shared = found.shared
        self.bank = ViewBank(self)
        self._tap = tap.Tap(self, view_key, index)
        self._route_through: str | None = None
        self._top_k: int | None = None

    def __repr__(self) -> str:
        return f"Block({self.name}: {self.num_experts} experts, {self.kind})"

    @property
    def num_experts(self) -> int:
        return self.experts.down_proj.shape[0]

    @property
    def row_map(self) -> Tensor | None:
        """Expert of each router row, int64 [R], in a block whose rows share experts; None where row r runs expert r."""
        return shared_rows.map_of(self.experts)

    @property
    def rows(self) -> int:
        """R: what the router chooses among, shared experts and null classes not counted."""
        held = getattr(self.experts, shared_rows.MAP, None)
        return self.num_experts if held is None else len(held)

    @property
    def width(self) -> int:
        """D of the router's input."""
        if self.router is not None:
            matrices: list[Tensor] = [p for p in self.router.parameters() if p.dim() == 2]
            if matrices:
                return matrices[0].shape[1]
        return self.bank.width

    @property
    def top_k(self) -> int:
        """Experts per token: the router's own number, or the width of what it chooses for one token."""
        given = getattr(self.router, "top_k", None)
        if isinstance(given, int):
            return given
        if self._top_k is None:
            weight = next(self.parent.parameters())
            probe = torch.zeros(1, 1, self.width, dtype=weight.dtype, device=weight.device)
            with torch.no_grad():
                self._top_k = tap.token_major(self.route(probe))[0].shape[1]
        return self._top_k

    @property
    def scores(self) -> str:
        """Where `logits_TE` come from: "router" (raw), "probabilities" (their log) or "rebuilt" (from the weights)."""
        return self._tap.scores or ("router" if self.router is not None else "rebuilt")

    @property
    def expert_bytes(self) -> int:
        return self.bank.expert_bytes

    @property
    def shared_bytes(self) -> int:
        return 0 if self.shared is None else _bytes(self.shared)

    @property
    def kind(self) -> Kind:
        experts = self.experts
        act = getattr(experts, "act_fn", None)
        name = "" if act is None else getattr(act, "__name__", type(act).__name__).removesuffix("Activation").lower()
        return Kind(
            self.bank.gated,
            self.bank.biased,
            self.bank.transposed,
            self.bank.interleaved,
            implementation.has_own_gate(experts),
            bool(getattr(experts, "has_post_expert_norm", False)),
            name,
        )

    def route(self, x: Tensor, **context: Any) -> Routing:
        """The routing of x, [T, D] or [B, N, D], without running the experts; equal to what the block does inside.

        x is what the block receives (the router's own input where the router sits directly in a decoder layer).
        `context` is passed on where the block asks for more than x, such as `input_ids` of a hash router.
        Policies in force and routing hooks apply.
        """
        x_BND = x if x.dim() == 3 else x.unsqueeze(0)
        if self._route_through is None:
            self._route_through = self._find_route(x_BND, context)
        if self._route_through == "block":
            routing, _ = self._tap.capture(lambda: self.parent(self._own(x_BND), **context))
        else:
            routing = self._route_directly(x_BND, context)
        return routing.replace(probs_TE=torch.softmax(routing.logits_TE.float(), -1))

    def route_under(self, policy: Policy, x: Tensor, **context: Any) -> Routing:
        """`route` as if `policy` held for this block, and no other policy."""
        (choice,) = resolve(policy, [self])
        rows = tap.Rows([[choice] * (self._tap.index + 1)], [0])
        token = tap.active.set({**(tap.active.get() or {}), self._tap.view_key: rows})
        try:
            return self.route(x, **context)
        finally:
            tap.active.reset(token)

    def _own(self, x: Tensor) -> Tensor:
        return x.clone() if self.parent.training else x  # in training some blocks add noise to their input in place

    def _find_route(self, x_BND: Tensor, context: dict) -> str:
        """Through the block where its router sees x itself; else x is not the block's input but the router's."""
        x_BND = self._own(x_BND)
        try:
            _, seen = self._tap.capture(lambda: self.parent(x_BND, **context))
        except (TypeError, AttributeError, ValueError) as error:
            if self.router is None:
                raise BadInput(f"{self.name}: its block cannot be run on x alone ({error})") from error
            return "router"
        if self.router is None:
            return "block"
        same = seen is not None and seen.numel() == x_BND.numel() and torch.equal(seen.reshape(x_BND.shape), x_BND)
        return "block" if same else "router"

    def _route_directly(self, x_BND: Tensor, context: dict) -> Routing:
        if self.router is None:
            raise BadInput(f"{self.name} has no separate router")
        try:
            output = self.router(x_BND.reshape(-1, x_BND.shape[-1]), **context)
        except TypeError as error:
            raise BadInput(f"{self.name}: its router needs more than x ({error}); pass it by name") from error
        at = ids_at(output)
        ids_TK = output[at]
        weights = next(p for p in output if isinstance(p, Tensor) and p.is_floating_point() and p.shape == ids_TK.shape)
        held_R = self.row_map
        if held_R is not None:
            ids_TK, weights = shared_rows.once(ids_TK, weights, held_R, skips=True)
        return self._tap.routing(ids_TK, weights, output)

    def on_route(self, fn: Callable[[Routing, Block], Routing | None]) -> tap.Handle:
        """Call fn(routing, block) before the experts run; a Routing that it returns replaces the block's own."""
        return self._tap.listen(self._tap.route_listeners, fn)

    def on_experts(self, fn: Callable[[Tensor, Routing, Tensor, Block], Tensor | None]) -> tap.Handle:
        """Call fn(x_TD, routing, y_TD, block) after the experts ran; a tensor that it returns replaces y."""
        return self._tap.listen(self._tap.expert_listeners, fn)

    def on_choice(self, fn: Callable[[tap.Choice, Block], None], scores: bool = False) -> tap.Handle:
        """Call fn(choice, block) before the experts run, after every policy and hook: the cheap way only to watch.

        `scores` also brings what the router returned, which `logits` reads.
        """
        return self._tap.listen(self._tap.watchers, fn, light=not scores)

    def logits(self, choice: tap.Choice) -> Tensor | None:
        """Router scores [T, E] of a watched choice; None where the router returns none."""
        return self._tap.logits(choice.router_output)

    def hold(self) -> tap.Handle:
        """Keep this block's hooks in place until the handle is removed."""
        self._tap.acquire()
        return tap.Handle(self._tap.release)


class View(Sequence[Block]):
    """The MoE blocks of a model in layer order; index by number or by name."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._blocks = [Block(found, id(self), i) for i, found in enumerate(discover.find(model))]
        if not self._blocks:
            raise NotMoE(
                f"{type(model).__name__} has no Mixture-of-Experts block: no module keeps stacked experts behind "
                "transformers' experts interface"
            )

    @overload
    def __getitem__(self, index: int | str) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | str | slice) -> Block | list[Block]:
        if isinstance(index, str):
            for block in self._blocks:
                if block.name == index:
                    return block
            raise BadInput(f"no MoE block {index!r}: blocks are {', '.join(block.name for block in self._blocks)}")
        return self._blocks[index]

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        return f"View({type(self.model).__name__}: {len(self)} MoE blocks)"

    def on_route(self, fn: Callable[[Routing, Block], Routing | None]) -> tap.Handle:
        """`Block.on_route` on every block, behind one handle."""
        return _all([block.on_route(fn) for block in self])

    def on_experts(self, fn: Callable[[Tensor, Routing, Tensor, Block], Tensor | None]) -> tap.Handle:
        """`Block.on_experts` on every block, behind one handle."""
        return _all([block.on_experts(fn) for block in self])

    @contextmanager
    def policy(
        self,
        policy: Policy | None = None,
        *,
        rows: Sequence[Policy | None] | None = None,
        sequence_ids: Tensor | None = None,
        **fields: Any,
    ) -> Iterator[View]:
        """Route by a policy inside the `with` block, in this thread or task only; the innermost policy holds.

        Give one policy (or its fields: k=, mask=, without=, bias=, force=, fn=), or `rows`: a policy, or None, for each
        row of the batch. With packed rows, `sequence_ids` [T] says which row of `rows` each token follows.
        """
        if rows is not None and (policy is not None or fields):
            raise BadInput("policy: give one policy or rows of policies, not both")
        if rows is None:
            rows = [Policy(**fields) if policy is None else policy]
        if not rows:
            raise BadInput("policy: rows is empty")
        distinct: list[Policy | None] = []
        row_of = []
        for row in rows:
            known = next((i for i, other in enumerate(distinct) if other is row), None)
            row_of.append(len(distinct) if known is None else known)
            if known is None:
                distinct.append(row)
        token = tap.active.set(
            {**(tap.active.get() or {}), id(self): tap.Rows([resolve(p, self) for p in distinct], row_of, sequence_ids)}
        )
        for block in self:
            block._tap.acquire()
        try:
            yield self
        finally:
            for block in self:
                block._tap.release()
            tap.active.reset(token)

    def summary(self) -> dict[str, Any]:
        """Architecture, sizes and bytes, as `moesaic view --json` prints them."""
        experts = sum(block.expert_bytes * block.num_experts for block in self)
        top_k = sorted({block.top_k for block in self})
        counts = sorted({block.num_experts for block in self})
        return {
            "architecture": type(self.model).__name__,
            "layers": len(self),
            "experts": counts[0] if len(counts) == 1 else counts,
            "top_k": top_k[0] if len(top_k) == 1 else top_k,
            "expert_bytes": experts,
            "shared_bytes": sum(block.shared_bytes for block in self),
            "total_bytes": _bytes(self.model),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def _all(handles: list[tap.Handle]) -> tap.Handle:
    def undo() -> None:
        for handle in handles:
            handle.remove()

    return tap.Handle(undo)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
