"""Hooks at the one experts call of a block and at its router: where routing is seen, replaced and steered.

Hooks are on the modules only while someone listens, so a viewed model runs as it was built. Per-call state lives in
thread-local storage and policies in a context variable: two threads, or two asyncio tasks, never see each other's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.view import implementation, shared_rows
from moesaic.view.policy import Choice as PolicyChoice
from moesaic.view.rerun import ids_at, rerun
from moesaic.view.slots import below, empty, token_major

if TYPE_CHECKING:
    from moesaic.view.block import Block

_lock = threading.Lock()
_pending = threading.local()
active: ContextVar[dict[int, Rows] | None] = ContextVar("moesaic_policy", default=None)
"""Per view (by id): the policies in force in this context."""


class Choice(NamedTuple):
    """What an experts call is about to run, as the block handed it over: seen, not changed."""

    x: Tensor
    ids: Tensor
    """[T, K]; ids outside [0, E) are slots that run nothing here."""
    weights: Tensor
    router_output: Any


class Captured(Exception):
    """Carries a finished routing out of a block whose experts need not run."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing


def _one(choices: list[PolicyChoice]) -> bool:
    """Whether a policy is about one token of each row."""
    return bool(choices) and choices[0].at != "all"


class Rows:
    """Policies in force: `choices[p][b]` for policy p and block b, and which policy each batch row or token follows."""

    def __init__(self, choices: list[list[PolicyChoice]], row_of: list[int], sequence_ids_T: Tensor | None = None) -> None:
        self.choices, self.row_of, self.sequence_ids_T = choices, row_of, sequence_ids_T
        self.some_last = any(_one(policy) for policy in choices)

    def policy_T(self, tokens: int, device: torch.device) -> Tensor | None:
        """Policy number of each token; None when one policy holds for all. One past the last policy is "none of them"."""
        if len(self.choices) == 1 and not self.some_last:
            return None
        row_T = self._row_T(tokens, device)
        policy_T = torch.tensor(self.row_of, device=device)[row_T]
        if not self.some_last:
            return policy_T
        at_T = torch.arange(tokens, device=device)
        counts_B = torch.bincount(row_T, minlength=len(self.row_of))
        end_B = torch.zeros_like(counts_B).scatter_reduce(0, row_T, at_T, "amax", include_self=False)
        wanted_B = torch.full_like(counts_B, -1)
        for row, policy in enumerate(self.row_of):
            wanted_B[row] = self._wanted(self.choices[policy], int(end_B[row]), int(counts_B[row]))
        only_T = torch.tensor([_one(choices) for choices in self.choices], device=device)[policy_T]
        return policy_T.masked_fill(only_T & (at_T != wanted_B[row_T]), len(self.choices))

    @staticmethod
    def _wanted(choices: list[PolicyChoice], end: int, count: int) -> int:
        """The one token of a row that its policy is about, -1 for none; a row's tokens end at `end`."""
        at = choices[0].at if choices else "all"
        if isinstance(at, str):
            return end if at == "last" or count > 1 else -1
        place = at if at >= 0 else count + at
        return end - count + 1 + place if 0 <= place < count else -1

    def _row_T(self, tokens: int, device: torch.device) -> Tensor:
        rows = len(self.row_of)
        if self.sequence_ids_T is not None:
            if self.sequence_ids_T.numel() != tokens:
                raise BadInput(f"policy: sequence_ids names {self.sequence_ids_T.numel()} tokens, the call has {tokens}")
            return self.sequence_ids_T.reshape(-1).to(device)
        if tokens % rows:
            raise BadInput(f"policy: {rows} rows given, but the call has {tokens} tokens; give sequence_ids")
        return torch.arange(rows, device=device).repeat_interleave(tokens // rows)


class Handle:
    """Takes a hook back: `.remove()`, or leave the `with` block."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Tap:
    """The hooks of one block. `acquire` and `release` count the users; the last one to leave takes the hooks off."""

    def __init__(self, block: Block, view_key: int, index: int) -> None:
        self.block, self.view_key, self.index = block, view_key, index
        self.route_listeners: list[Callable] = []
        self.expert_listeners: list[Callable] = []
        self.watchers: list[Callable] = []
        self.users = self.light_users = 0
        self.scores: str | None = None
        self._entry: RemovableHandle | None = None
        self._handles: list[RemovableHandle] = []

    def acquire(self, light: bool = False) -> None:
        """Put the hooks on; who only looks at choices (`light`) needs none on the router and none after the experts."""
        with _lock:
            experts, router = self.block.experts, self.block.router
            if self._entry is None:
                self._entry = experts.register_forward_pre_hook(self._before_experts, with_kwargs=True)
            if light:
                self.light_users += 1
                return
            self.users += 1
            if self.users > 1:
                return
            self._handles = [experts.register_forward_hook(self._after_experts, with_kwargs=True)]
            if router is not None:
                self._handles.append(router.register_forward_hook(self._after_router, with_kwargs=True))

    def release(self, light: bool = False) -> None:
        with _lock:
            if light:
                self.light_users -= 1
            else:
                self.users -= 1
            if self.users == 0:
                for handle in self._handles:
                    handle.remove()
                self._handles = []
                if self.light_users == 0 and self._entry is not None:
                    self._entry.remove()
                    self._entry = None

    def listen(self, listeners: list[Callable], fn: Callable, light: bool = False) -> Handle:
        self.acquire(light)
        listeners.append(fn)

        def undo() -> None:
            listeners.remove(fn)
            self.release(light)

        return Handle(undo)

    def capture(self, call: Callable[[], Any]) -> tuple[Routing, Tensor | None]:
        """Run `call` until the experts would run; the routing, and the input that the router saw."""
        self.acquire()
        state = self._state()
        state["capture"] = True
        try:
            call()
        except Captured as captured:
            return captured.routing, state.get("router_input")
        finally:
            state.clear()
            self.release()
        raise BadInput(f"{self.block.name}: running the block did not reach its experts")

    def routing(self, ids: Tensor, weights: Tensor, output: Any = None, empty_TK: Tensor | None = None) -> Routing:
        """A Routing from what the block hands to its experts and, where the router was seen, its output."""
        num_experts = self.block.num_experts
        experts_TK = ids.reshape(-1, ids.shape[-1]).long()
        # Expert parallelism marks slots of other ranks with ids past the last expert.
        experts_TK = torch.where(experts_TK < num_experts, experts_TK, -1)
        if empty_TK is not None:
            experts_TK = experts_TK.masked_fill(empty_TK, -1)
        weights_TK = weights.reshape(experts_TK.shape)
        logits_TE = self.logits(output)
        if logits_TE is None or logits_TE.shape[0] != experts_TK.shape[0]:
            self.scores = "rebuilt"
            logits_TE = torch.full((experts_TK.shape[0], num_experts), float("-inf"), device=weights.device)
            logits_TE = logits_TE.scatter(1, experts_TK.clamp(min=0), weights_TK.detach().float().log())
        return Routing(logits_TE=logits_TE, experts_TK=experts_TK, weights_TK=weights_TK)

    def logits(self, output: Any) -> Tensor | None:
        """Scores [T, E] in what the router returned (raw, or the log of its probabilities); None where it holds none."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        first = first.logits_TE if isinstance(first, Routing) else first
        num_experts, held_R = self.block.rows, self.block.row_map
        if not isinstance(first, Tensor) or not first.is_floating_point() or first.shape[-1] < num_experts:
            return None
        scores_TE = first.reshape(-1, first.shape[-1])[:, :num_experts]
        if self.scores is None or self.scores == "rebuilt":
            rows = scores_TE.detach().float()
            sums_to_one = (rows >= 0).all() and torch.allclose(rows.sum(1), torch.ones_like(rows[:, 0]), atol=1e-3)
            self.scores = "probabilities" if sums_to_one and num_experts > 1 else "router"
        scores_TE = scores_TE.log() if self.scores == "probabilities" else scores_TE
        return scores_TE if held_R is None else shared_rows.of_experts(scores_TE, held_R)

    def _rows(self) -> Rows | None:
        return (active.get() or {}).get(self.view_key)

    def _state(self) -> dict[str, Any]:
        states = _pending.__dict__.setdefault("taps", {})
        return states.setdefault(id(self), {})

    def _after_router(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        state = self._state()
        if state.get("capture"):
            state["router_input"] = args[0] if args else next(iter(kwargs.values()), None)
        rows = self._rows()
        changed = None
        if rows is not None and any(choices[self.index].selects for choices in rows.choices):
            output = changed = self._steered(rows, module, args, kwargs, output, state)
        state["router"] = output
        return changed

    def _steered(self, rows: Rows, module: Any, args: tuple, kwargs: dict, output: Any, state: dict) -> Any:
        tokens = output[ids_at(output)].shape[0]
        policy_T = rows.policy_T(tokens, output[ids_at(output)].device)
        outputs = []
        for choices in rows.choices:
            choice = choices[self.index]
            steered = rerun(module, args, kwargs, output, choice, self.block.rows) if choice.selects else output
            outputs.append(steered)
        if policy_T is None:
            return outputs[0]
        if rows.some_last:
            outputs.append(output)
        return _stitch(outputs, policy_T, state)

    def _before_experts(self, module: Any, args: tuple, kwargs: dict) -> Any:
        state = self._state()
        names, values = list(kwargs), [*args, *kwargs.values()]
        x, ids, weights = values[:3]
        output = state.pop("router", None)
        if self.watchers and not (
            self.route_listeners or self.expert_listeners or "capture" in state or self.block.bank.remapped or active.get()
        ):  # nobody can change the routing: what watches it need not wait for a Routing to be made
            self._show(Choice(x, ids, weights, output))
            return None
        routing = given = self.routing(ids, weights, output, state.pop("empty", None))
        if self.block.bank.remapped:
            rows_TK, _ = token_major(routing)
            stored = self.block.bank.row_to_expert.to(rows_TK.device)[rows_TK.clamp(min=0)]
            routing = routing.replace(experts_TK=torch.where(rows_TK >= 0, stored, -1), selected_TK=rows_TK)
        routing = self._policy_functions(routing)
        for fn in list(self.route_listeners):
            routing = self._checked(fn(routing, self.block), routing)
        if state.get("capture"):
            raise Captured(routing)
        state["routing"] = routing
        if self.watchers:
            self._show(Choice(x, *token_major(routing), output))
        if routing is given:
            return None
        values[1:3] = self._slots(routing, module)
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    def _show(self, choice: Choice) -> None:
        for fn in list(self.watchers):
            fn(choice, self.block)

    def _policy_functions(self, routing: Routing) -> Routing:
        rows = self._rows()
        if rows is None or not any(choices[self.index].finishes for choices in rows.choices):
            return routing
        policy_T = rows.policy_T(routing.tokens, routing.logits_TE.device)
        if policy_T is None:
            return self._finished(rows.choices[0][self.index], routing)
        ids_TK, weights_TK = token_major(routing)
        for p, choices in enumerate(rows.choices):
            at_t = (policy_T == p).nonzero()[:, 0]
            if not choices[self.index].finishes or not len(at_t):
                continue
            # A function sees its own tokens alone: what it does with them owes nothing to the batch's others.
            own_tK, weights_tK = token_major(self._finished(choices[self.index], _tokens(routing, at_t)))
            width = max(ids_TK.shape[1], own_tK.shape[1])
            ids_TK, own_tK = (pad(ids, (0, width - ids.shape[1]), value=-1) for ids in (ids_TK, own_tK))
            weights_TK, weights_tK = (pad(part, (0, width - part.shape[1])) for part in (weights_TK, weights_tK))
            ids_TK, weights_TK = ids_TK.index_copy(0, at_t, own_tK), weights_TK.index_copy(0, at_t, weights_tK)
        return routing.replace(experts_TK=ids_TK, weights_TK=weights_TK)

    def _finished(self, choice: PolicyChoice, routing: Routing) -> Routing:
        if choice.threshold is not None:
            routing = empty(routing, below(routing, choice.threshold))
        return routing if choice.fn is None else self._checked(choice.fn(routing, self.block), routing)

    def _checked(self, result: Any, routing: Routing) -> Routing:
        if result is None:
            return routing
        name, held = self.block.name, len(self.block.bank)
        if not isinstance(result, Routing) or result.experts_TK is None or result.weights_TK is None:
            raise BadInput(f"{name}: a routing hook returns None or a Routing with experts_TK and weights_TK")
        ids_TK = result.experts_TK
        if ids_TK.shape[0] != routing.tokens or ids_TK.shape != result.weights_TK.shape:
            raise BadInput(f"{name}: a routing hook gave ids {list(ids_TK.shape)} for {routing.tokens} tokens")
        if int(ids_TK.max()) >= held:
            raise BadInput(f"{name} has {held} experts: a routing hook chose expert {int(ids_TK.max())}")
        return result

    @staticmethod
    def _slots(routing: Routing, module: Any) -> tuple[Tensor, Tensor]:
        """Ids and weights as the implementation in use can take them: ours skips empty slots, others run them at weight 0."""
        ids_TK, weights_TK = token_major(routing)
        if getattr(module.config, "_experts_implementation", None) != implementation.NAME:
            empty_TK = ids_TK < 0
            ids_TK, weights_TK = ids_TK.clamp(min=0), weights_TK.masked_fill(empty_TK, 0)
        return ids_TK, weights_TK

    def _after_experts(self, module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        routing = self._state().pop("routing", None)
        if not self.expert_listeners or routing is None:
            return None
        x_TD = args[0] if args else next(iter(kwargs.values()))
        changed = None
        for fn in list(self.expert_listeners):
            result = fn(x_TD, routing, output if changed is None else changed, self.block)
            if result is not None:
                if result.shape != output.shape:
                    raise BadInput(f"{self.block.name}: an experts hook must return {list(output.shape)}")
                changed = result
        return changed


def _tokens(routing: Routing, at_t: Tensor) -> Routing:
    """Some tokens of a routing that a block's experts were handed."""
    ids_TK, weights_TK = token_major(routing)
    selected_TK = None if routing.selected_TK is None else routing.selected_TK[at_t]
    return routing.replace(
        logits_TE=routing.logits_TE[at_t], experts_TK=ids_TK[at_t], weights_TK=weights_TK[at_t], selected_TK=selected_TK
    )


def _stitch(outputs: list[Any], policy_T: Tensor, state: dict) -> tuple:
    """One router output from several: token t takes its part from the output of its policy; short rows get empty slots."""
    at = ids_at(outputs[0])
    tokens = policy_T.shape[0]
    width = max(output[at].shape[1] for output in outputs)
    parts = []
    for i in range(len(outputs[0])):
        first = outputs[0][i]
        if not isinstance(first, Tensor) or first.dim() != 2 or first.shape[0] != tokens:
            parts.append(first)
            continue
        slots = first.shape == outputs[0][at].shape
        merged = None
        for p, output in enumerate(outputs):
            part = pad(output[i], (0, width - output[i].shape[1])) if slots else output[i]
            merged = part if merged is None else torch.where((policy_T == p)[:, None], part, merged)
        parts.append(merged)
    k_T = torch.tensor([output[at].shape[1] for output in outputs], device=policy_T.device)[policy_T]
    state["empty"] = torch.arange(width, device=policy_T.device) >= k_T[:, None]
    return tuple(parts)
