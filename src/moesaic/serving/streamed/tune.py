"""Which policy, and how much memory, would serve this text best: record it, replay it over what can run live, choose.

The link is timed on the checkpoint's own experts through the reader that will serve them; the time that a token takes when
nothing is missing is what the recorded tokens took without their waiting. Both go into the replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moesaic.core.errors import BadInput
from moesaic.core.registry import entries
from moesaic.serving.streamed.engine import GIVEN, reason_against
from moesaic.trace import corpus, sweep
from moesaic.trace import simulate as sim
from moesaic.trace.file import Trace
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.trace.recorder import Recorder
from moesaic.trace.replay import history_of, replay

if TYPE_CHECKING:
    from moesaic.serving.streamed import Streamed

SHARES = (0.25, 0.5, 1.0)
"""Of the budget's cache: does less do as well?"""
CONTEXT, TOKENS, WRITTEN = 512, 4096, 128
"""Tokens per piece of a given text, of all of it, and written on from a prompt alone."""
TIMED_BYTES = 256 << 20
CLOSE = 0.01
"""Rates within one per cent are equal: the plainer policy is taken."""


@dataclass
class Tuned:
    """`rows`: one per policy and cache size; `chosen` is one of them. `belady`: the bound at each share of SHARES."""

    rows: list[dict[str, Any]]
    chosen: dict[str, Any]
    why: str
    hardware: Hardware
    trace: Trace
    belady: dict[float, dict[str, Any]]

    def row(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "rows": self.rows,
            "chosen": self.chosen,
            "why": self.why,
            "tokens": len(self.trace),
            "hardware": self.hardware.describe(),
        }


def candidates() -> list[tuple[str, Policy]]:
    """Registered policies that a running model can serve, with default options."""
    built = [(entry.name, entry.build()) for entry in entries("policies")]
    return [(name, policy) for name, policy in built if policy.exact and policy.needs <= GIVEN]


def record(streamed: Streamed, prompt: list[int] | None, documents: Any = None) -> tuple[Trace, bool, float]:
    """The trace of this text on the streamed model, whether it is to be replayed as decoding, and seconds that a decoded
    token takes beside waiting for experts. A prompt is continued; a text is read in pieces."""
    model, layers = streamed.model, len(streamed.engine.layers)
    with Recorder(model, tokenizer=streamed.tokenizer, lookahead=min(3, layers - 1), logits=True) as recorder:
        if documents is None:
            assert prompt is not None
            _write_on(model, prompt, WRITTEN)
        else:
            found = list(corpus.pieces(documents, streamed.tokenizer, min(CONTEXT, corpus.context_of(model.config, None))))
            kept, left = [], TOKENS
            for piece in found:
                kept += [piece._replace(ids=piece.ids[:left])] if left > 0 else []
                left -= len(piece.ids)
            if not kept:
                raise BadInput("--tune: the text has no tokens")
            corpus.read(model, kept, size=1)
            prompt = kept[0].ids[:32]
    assert recorder.result is not None
    return recorder.result, documents is not None, _seconds_of_a_token(streamed, prompt)


def _write_on(model: Any, prompt: list[int], tokens: int) -> None:
    corpus.write_on(model, prompt, tokens, seed=0, temperature=0.8, pad=0, end=model.generation_config.eos_token_id)


def _seconds_of_a_token(streamed: Streamed, prompt: list[int]) -> float:
    """Decoding, less what it waits for the disk: the least of a few tokens, as a machine at rest would take."""
    model, best, cache = streamed.model, float("inf"), None
    with torch.inference_mode():
        ids = torch.tensor([prompt[-min(len(prompt), 16) :]])
        for _ in range(9):
            began, stalled = time.perf_counter(), streamed.stats.stall_seconds
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            took = time.perf_counter() - began - (streamed.stats.stall_seconds - stalled)
            best = best if cache is None else min(best, took)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return best


def link_of(streamed: Streamed) -> float:
    """Bytes per second at which experts of this checkpoint come through the reader that serves them."""
    engine = streamed.engine
    places = [(layer, e) for layer in engine.layers for e in range(layer.experts)]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(0)).tolist()
    some, size = [], 0
    for at in order:
        if size >= TIMED_BYTES:
            break
        some.append(places[at])
        layer, e = places[at]
        size += layer.bytes_E[e]
    before, began = engine.reader.counters.bytes, time.perf_counter()
    tickets: list[Any] = []
    for layer, e in some:
        for source in layer.sources:
            tickets.append(engine.reader.fetch([(r, torch.empty(r.shape, dtype=r.dtype)) for r in source.ranges(e)]))
        if len(tickets) > 16:
            tickets.pop(0).wait()
    for ticket in tickets:
        ticket.wait()
    return (engine.reader.counters.bytes - before) / (time.perf_counter() - began)


def tune(
    streamed: Streamed,
    prompt: list[int] | None,
    documents: Any = None,
    hardware: Hardware | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Tuned:
    """Record, replay every candidate at a few shares of the budget's cache, and choose. `streamed` must route exactly."""
    engine = streamed.engine
    progress("timing the link")
    machine = (hardware or Hardware()).with_(link_bytes_per_second=link_of(streamed), host_flops=0.0, link_latency_seconds=1e-4)
    progress("recording the text")
    trace, as_decode, alone = record(streamed, prompt, documents)
    rows, belady = [], {}
    for share in SHARES:
        capacity = int(share * engine.plan.capacity_bytes)
        for name, policy in [("belady", sweep.build("belady")), *candidates()]:
            progress(f"replaying {name} at {share:.0%}")
            row = _row(trace, name, policy, capacity, machine, as_decode, alone, engine.shape)
            if name == "belady":
                belady[share] = row
            else:
                bound = {f"belady_{key}": belady[share][key] for key in ("hit_rate", "tokens_per_second")}
                rows.append({**row, **bound})
    chosen, why = choose([row for row in rows if row["reason"] is None])
    return Tuned(rows, chosen, why, machine, trace, belady)


def _row(
    trace: Trace, name: str, policy: Policy, capacity: int, machine: Hardware, as_decode: bool, alone: float, shape: Shape
) -> dict[str, Any]:
    row: dict[str, Any] = {"policy": name, "cache_bytes": capacity, "cache_share": capacity / shape.total_bytes, "reason": None}
    try:
        history, rest = history_of(trace, 0.2, as_decode) if policy.learns else (None, None)
    except BadInput:  # one sequence: nothing can be set aside
        history, rest = None, None
    try:
        if policy.entry.name != "belady":
            policy.history = history
            policy.start(shape, capacity, machine)
            against = reason_against(policy)
            if against is not None:
                raise BadInput(against)
        result = replay(
            trace,
            policy,
            capacity,
            machine,
            as_decode=as_decode,
            sequences=rest,
            history=history,
            shape=shape,
            resident_bytes=0,
        )
    except BadInput as error:
        return {**row, "reason": str(error), "hit_rate": None, "tokens_per_second": None}
    found = result.row()
    stall = found["stall_seconds"] / max(1, int(result.mark[sim.TOKENS]))
    moved = found["moved_bytes_per_token"]
    miss = 1 - found["hit_rate"]
    token_bytes = float(shape.top_k * shape.bytes_L.sum())
    return {
        **row,
        "hit_rate": found["hit_rate"],
        "moved_bytes_per_token": moved,
        "speculative_bytes": found["speculative_bytes_used"] + found["speculative_bytes_wasted"],
        "stall_seconds_per_token": stall,
        "tokens_per_second": 1 / (alone + stall),
        "bound_tokens_per_second": machine.link_bytes_per_second / (miss * token_bytes) if miss > 0 else None,
    }


def choose(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """The fastest row; of rows within a per cent the one that reads ahead least, then keeps least, then lru before others."""
    best = max(row["tokens_per_second"] for row in rows)
    close = [row for row in rows if row["tokens_per_second"] >= (1 - CLOSE) * best]
    chosen = min(close, key=lambda r: (r["speculative_bytes"], r["cache_bytes"], r["policy"] != "lru", -r["tokens_per_second"]))
    lru = next((r for r in rows if r["policy"] == "lru" and r["cache_bytes"] == chosen["cache_bytes"]), None)
    gain = "" if lru is None or lru is chosen else f", lru {lru['tokens_per_second']:,.1f}"
    others = len(close) - 1
    return chosen, (
        f"{chosen['policy']} at {chosen['cache_share']:.0%}: {chosen['tokens_per_second']:,.1f} tokens/s predicted{gain}"
        + (f"; {others} more within 1 %, which read ahead or keep more" if others else "")
    )
