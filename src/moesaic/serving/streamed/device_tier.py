"""The upper tier: experts in a device's slots under a budget of its own, over experts in host memory, over the disk.

At each experts call a cache policy, the object that the replay simulates, says what is on the device already, what moves
there, and what the host computes where it lies, by the times that `hardware` states. The host learns the routing in one
read-back per layer, and waits for the device nowhere else.

One forward pass at a time, as below.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.routing import Dispatch
from moesaic.kernels import Weights, dispatch_slots, few_rows
from moesaic.kernels.products import Span, hit_spans
from moesaic.kernels.slots import bounds_of
from moesaic.serving.streamed.below import Below
from moesaic.serving.streamed.budget import MOST_STAGING, Plan
from moesaic.serving.streamed.device_costs import measure
from moesaic.serving.streamed.device_lift import Lift
from moesaic.serving.streamed.device_stats import HOSTS, DeviceStats
from moesaic.serving.streamed.device_work import Gathered, Ordered, Work, host_form
from moesaic.serving.streamed.devices import Copy, Device, DeviceSlots
from moesaic.serving.streamed.engine import by_demand
from moesaic.serving.streamed.prefetch import mean_scores
from moesaic.trace import calls
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.view import View, tap
from moesaic.view.block import Block
from moesaic.view.discover import expert_parameters
from moesaic.view.implementation import STREAMED

GIVEN = frozenset({"history", "scores"})
"""What this tier brings of what policies need."""


class DeviceLayer:
    """One block on the device: the slots of its size, which experts are in them, and the layer below.

    `form`: with biases on the device; `host_form`: with biases on the host.
    """

    def __init__(self, below: Any, form: Any) -> None:
        self.below, self.number, self.block, self.experts = below, below.number, below.block, below.experts
        like = below.stand_in()
        self.kind = (tuple(like.gate_up.shape[1:]), tuple(like.down.shape[1:]), like.gate_up.dtype)
        self.dtype, self.bytes = like.gate_up.dtype, below.block.expert_bytes
        self.form, self.host_form = below.form, form

    def use(self, slots: DeviceSlots, free: deque[tuple[int, Any]], shift: Any) -> None:
        """Begin with these slots, none of them filled; `free`: those to pass through, and since when each is."""
        self.slots, self.free, self._shift = slots, free, shift
        self.held: dict[int, int] = {}
        self.inside: dict[int, int] = {}
        gate_up, down = slots.tensors
        self.weights = Weights(gate_up, down, self.form, self.block.bank.transposed)

    def matrix(self, which: int, slot: int) -> Tensor:
        """A matrix of the expert in a slot."""
        return self.slots.matrix(which, slot, self._shift(self.below, which, self.inside[slot]))


class DeviceTier:
    """Serves every experts call of a model whose other weights lie on `device`. Made by `load_streamed` and `raise_experts`.

    Args:
        plan: the device's bytes for experts, as `budget.divide` divides them.
        hardware: what the policy is told of the machine; None: measured here, where the policy asks who computes a miss.
    """

    def __init__(
        self,
        view: View,
        below: Below,
        device: Device,
        policy: Policy,
        plan: Plan,
        shape: Shape,
        hardware: Hardware | None = None,
    ) -> None:
        unmet = sorted(policy.needs - GIVEN)
        if unmet:
            raise MissingNeed(
                f"policy {policy.entry.name} needs {', '.join(unmet)}, which a device tier does not give: replay it"
            )
        self.below, self.device, self.policy, self.plan, self.shape = below, device, policy, plan, shape
        self.layers = [DeviceLayer(layer, host_form(layer.form)) for layer in below.layers]
        self.hardware = hardware or Hardware()
        self._slots: dict[Any, DeviceSlots] = {}
        self._lock, self._here = threading.RLock(), threading.local()
        self._seen: set[int] = set()
        self._new = self._fresh = True
        self._copies: list[Copy] = []
        self.stats = DeviceStats(np.zeros((HOSTS + 1, len(self.layers)), np.int64))
        place_others(view.model, device.place)
        self._allocate()
        self._begin()
        if hardware is None and policy.state.note[S.WHERE] != S.MOVE:
            self.hardware = measure(self)
            self._begin()
        for layer in self.layers:
            setattr(layer.block.experts, STREAMED, _Call(self, layer))
        if "scores" in policy.needs:
            for layer in self.layers:
                layer.block.on_choice(self._watcher(layer), scores=True)
        self._watch = calls.watch_calls(view.model, self._before, lambda output: None)

    @property
    def held_bytes(self) -> int:
        """Memory behind all slots of the device."""
        return sum(slots.count * slots.slot_bytes for slots in self._slots.values())

    def clear(self) -> None:
        """Count from here on; what is on the device stays."""
        preloaded = self.stats.preloaded_bytes
        self.stats = DeviceStats(np.zeros((HOSTS + 1, len(self.layers)), np.int64), preloaded_bytes=preloaded)

    def close(self) -> None:
        """Give the device back. The model cannot run afterwards."""
        self._watch.remove()
        self._copies = []
        self.device.close()

    def detach(self) -> None:
        """After `close`: experts modules run by themselves again, where their weights are in memory; slots are freed."""
        for layer in self.layers:
            delattr(layer.block.experts, STREAMED)
        self.layers, self._slots = [], {}

    def settle(self) -> None:
        """Wait for copies whose source may change, or go."""
        copies, self._copies = self._copies, []
        if not self.below.fixed:
            for copy in copies:
                self.stats.stall_seconds += copy.wait()

    def _allocate(self) -> None:
        self._start()
        note, group = self.policy.state.note, self.policy.state.group
        kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
        if len(kinds) > 1 and note[S.WHOLE]:
            raise BadInput(
                f"policy {self.policy.entry.name} shares one cache among layers whose experts differ in size: "
                "on a device give one that keeps layers apart, such as lru"
            )
        self._slots = {}
        self._staging: dict[Any, list[int]] = {}
        for kind in kinds:
            mine = [layer for layer in self.layers if layer.kind == kind]
            experts = sum(layer.experts for layer in mine)
            staging = self.plan.staging
            if not note[S.ADMIT]:
                cached = sum(int(self.policy.resident(layer.number).sum()) for layer in mine)
                staging = staging or min(MOST_STAGING, experts - cached)
            elif note[S.WHOLE]:
                cached = min(experts, self.plan.capacity_bytes // mine[0].bytes)
            else:
                cached = sum(min(layer.experts, int(group[S.CAPACITY, layer.number]) // layer.bytes) for layer in mine)
            stack = all(few_rows.suits(layer.below.stand_in(), layer.dtype) for layer in mine)
            self._slots[kind] = slots = self.device.slots(kind[:2], kind[2], cached + staging, stack)
            self._staging[kind] = [slots.take() for _ in range(staging)]

    def _start(self) -> None:
        self.policy.start(self.shape, self.plan.capacity_bytes, self.hardware)
        against = self._reason_against()
        if against is not None:
            raise BadInput(against)

    def _reason_against(self) -> str | None:
        note, name = self.policy.state.note, self.policy.entry.name
        if note[S.DENSE]:
            return f"policy {name} moves experts that nobody chose: only the replay does that"
        if note[S.SOURCE] != S.NOTHING:
            less = f": give {name}:ahead=0" if name == "hybrimoe" else ""
            return f"policy {name} reads ahead, and a device tier copies on demand only{less}"
        post = any(layer.form.post is not None for layer in self.layers)
        if note[S.WHERE] != S.MOVE and post and self.device.place.type != "cpu":
            return f"policy {name} computes on the host, but this model's experts end in a norm that lies on the device"
        return None

    def _begin(self) -> None:
        """An empty device; also after an error, when nobody knows what the slots hold."""
        self._start()
        self.device.pin(self.below.memory())
        for kind, staging in self._staging.items():
            slots = self._slots[kind]
            mine = [layer for layer in self.layers if layer.kind == kind]
            for slot in [slot for layer in mine if hasattr(layer, "held") for slot in layer.held.values()]:
                slots.give(slot)
            free = deque((slot, None) for slot in staging)
            for layer in mine:
                layer.use(slots, free, self.below.shift if self.device.ordered else lambda layer, which, e: 0)
        self.stats = DeviceStats(np.zeros((HOSTS + 1, len(self.layers)), np.int64))
        for layer in self.layers:
            for e in np.flatnonzero(self.policy.resident(layer.number)[: layer.experts]).tolist():
                layer.held[e] = slot = layer.slots.take()
                layer.inside[slot] = e
                pairs = [(m, layer.matrix(which, slot)) for which, m in enumerate(self.below.read(layer.below, e))]
                self.device.copy(pairs, None).wait()
                self.stats.preloaded_bytes += layer.bytes

    def _before(self, call: calls.Call) -> None:
        self._new, self._fresh = True, not call.continues

    def _watcher(self, layer: DeviceLayer) -> Any:
        def watch(choice: tap.Choice, block: Block) -> None:
            self._here.__dict__.setdefault("choices", {})[layer.number] = choice

        return watch

    def routed(self, layer: DeviceLayer, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts call as transformers makes it: y [T, D]."""
        asked, logits_TE = [ids_TK, weights_TK], self._logits(layer)
        found = self.device.read_back(asked if logits_TE is None else [*asked, logits_TE])
        dispatch = dispatch_slots(found[0], found[1], layer.experts)
        return self.run(layer, x_TD, dispatch, found[0], found[2] if logits_TE is not None else None)

    def run(
        self, layer: DeviceLayer, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None, logits_TE: Tensor | None = None
    ) -> Tensor:
        """y [T, D] of a dispatch that lies on the host; x and y lie on the device."""
        with self._lock:
            try:
                spans = hit_spans(bounds_of(dispatch))
                if not spans:
                    return torch.zeros_like(x_TD)
                self._begin_pass(layer, x_TD.shape[0])
                experts, counts = by_demand(layer.experts, dispatch, ids_TK)
                lift = self._event(layer, x_TD.shape[0], experts, counts, logits_TE)
                spans = lift.order(spans)
                missed = np.array([e in lift.missing for e in experts.tolist()], bool)
                coming = [span for span in spans if span[0] in lift.missing]
                arriving: Iterator[list[Span]] = iter(())
                if coming:
                    self.settle()
                    arriving = self.below.bring(layer.below, x_TD.shape[0], experts[missed], counts[missed], coming)
                work = self._work(layer, x_TD, dispatch, lift.host)
                for on_host, part in lift.parts(spans, arriving):
                    (work.on_host if on_host else work.on_device)(part)
                for _ in arriving:  # the last of its slots are free
                    pass
                return work.finish()
            except BaseException:
                self._reset()
                raise

    def _work(self, layer: DeviceLayer, x_TD: Tensor, dispatch: Dispatch, host: set[int]) -> Work:
        if self.device.ordered:
            return Ordered(layer, x_TD, dispatch)
        return Gathered(self.device, layer, x_TD, dispatch, host)

    def _reset(self) -> None:
        self._copies = []
        try:
            self.device.settle()
            self.device.unpin()
        finally:
            self.below.reset()
            self._begin()

    def _begin_pass(self, layer: DeviceLayer, tokens: int) -> None:
        if self._new or layer.number in self._seen:
            self.policy.begin_step(self._fresh, tokens > 1)
            self.stats.passes += 1
            self._seen.clear()
            self._new = False
        self._seen.add(layer.number)

    def _event(
        self, layer: DeviceLayer, tokens: int, experts: np.ndarray, counts: np.ndarray, logits_TE: Tensor | None
    ) -> Lift:
        """One event of the policy: what it lets go gives its slot back, what is to stay takes one."""
        given: dict[str, Any] = {}
        if "scores" in self.policy.needs:
            given["scores_E"] = self._scores(layer, logits_TE, experts, counts)
        decision = self.policy.event(layer.number, experts, counts, step_tokens=tokens, **given)
        act, found, host = decision.action_n, decision.experts_n, decision.on_host_n
        self.stats.event(layer.number, act, host, len(decision.evicted_M2))
        for l, e in decision.evicted_M2.tolist():
            self.layers[l].slots.give(self.layers[l].held.pop(e))
        loads = set(found[(act == S.LOAD) & ~host].tolist())
        for e in sorted(loads):
            layer.held[e] = layer.slots.take()
        return Lift(self, layer, set(found[act != S.HIT].tolist()), loads, set(found[host].tolist()))

    def _logits(self, layer: DeviceLayer) -> Tensor | None:
        choice = self._here.__dict__.get("choices", {}).pop(layer.number, None)
        return None if choice is None else layer.block.logits(choice)

    def _scores(self, layer: DeviceLayer, logits_TE: Tensor | None, experts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The router's scores, mean over tokens; where it shows none, or the bank is run by hand, shares of the tokens."""
        if logits_TE is not None and logits_TE.shape[0]:
            return mean_scores(self.policy, logits_TE)
        share_E = np.zeros(layer.experts)
        share_E[experts] = counts / max(1, counts.sum())
        return share_E

    def copy(self, layer: DeviceLayer, e: int, slot: int, host_slot: int, after: Any) -> Copy:
        """Begin to copy an expert from a slot of the host into one of the device, not before the moment `after`."""
        layer.inside[slot] = e
        pairs = [(layer.below.matrix(which, host_slot), layer.matrix(which, slot)) for which in (0, 1)]
        made = self.device.copy(pairs, after)
        self._copies.append(made)
        self.stats.moved_bytes += layer.bytes
        return made


class _Call:
    """What stands on an experts module: `implementation.STREAMED`."""

    def __init__(self, tier: DeviceTier, layer: DeviceLayer) -> None:
        self.tier, self.layer = tier, layer

    def routed(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.tier.routed(self.layer, x_TD, ids_TK, weights_TK)

    def __call__(self, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None) -> Tensor:
        """A dispatch by hand."""
        tensors = [dispatch.token_S, dispatch.weight_S, dispatch.offsets_E1, *([] if ids_TK is None else [ids_TK])]
        token_S, weight_S, offsets_E1, *ids = self.tier.device.read_back(tensors)
        here = Dispatch(token_S, weight_S, offsets_E1, dispatch.tokens)
        return self.tier.run(self.layer, x_TD, here, ids[0] if ids else None)


def place_others(model: Any, place: torch.device) -> None:
    """Move what lies on the CPU and is no expert (those have no memory, or stay) to the device, tied weights once."""
    kept = {id(model.get_parameter(name)) for name in expert_parameters(model)}
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if not tensor.is_meta and id(tensor) not in kept:
            tensor.data = tensor.data.to(place)
