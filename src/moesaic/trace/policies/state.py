"""The arrays that every policy is made of, in two named tuples that compiled code reads and writes in place.

Few and wide arrays with named rows, because every array of an argument costs compiled code time at every call.
Suffixes: L layers, E experts (the most of any layer), G groups of layers that share room (L, or 1), N stored requests,
P stored paths. A serial numbers events, a stamp numbers touches; both only grow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# State.real [row, L, E]: what an expert is worth (lower leaves first); tokens of the running request.
KEEP, REQUEST, REALS = range(3)
# State.cell [row, L, E]; SIZE: bytes of the expert
RESIDENT, STAMPED, USED_AT, GUARD, SEEN, GUESS, FIXED, PART, SLOT, PLACE, WANT, VOTED, SIZE, CELLS = range(14)
# State.factor [row, L]: by how much a layer's worths count; least worth of a layer (while not stale); layer's own number.
SCALE, LOW, TARGET, FACTORS = range(4)
# State.layer [row, L]; BYTES: of one expert, the mean where they differ; five rows from PARTS on: how many experts are on
# each of ARC's lists
EXPERTS, BYTES, GROUP, FILLED, GUESSES, LOW_STAMP, LOW_AT, STALE, WANTED, PARTS, LAYERS = 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 14
# State.group [row, G], bytes
CAPACITY, ROOM, PART_BYTES, GROUPS = range(4)
# State.score [2, E]: router scores of the event, and room to add up in
# State.event [row, E]: the event in progress, and room to sort in
IDS, TOKENS, ACT, ON_HOST, NEXT, RANK, VOTES, GUESSED, EVENTS = range(9)
# State.number: the reals of a policy
GAIN, GROWTH, ALPHA, TOP, CPU_COST, GPU_COST, SHARE, FALL, NUMBERS = range(9)
# State.note: whole numbers of a policy (its rules), then counters
(RULE, WHOLE, ADMIT, PINS, BYPASS, BYPASS_TOKENS, WHERE, SOURCE, WIDTH, DEPTH, HOST_TOKENS, WRAP, HORIZON, ONLY_BETTER,
 DENSE, WINDOW, MEASURED, SIGMOID, AT_MOST, STAMP, SERIAL, STEP, STEP_SERIAL, GONE, CURSOR_D, CURSOR, PREVIOUS, BEST,
 PHASE, ROWS, AT, STAGE, STAGE_ROOM, WASTED, SPENT, NOTES) = range(36)  # fmt: skip

# cell[RESIDENT]
ABSENT, HERE, COMING, STAGED, STAGING = range(5)
# event[ACT]: what became of each expert of an event
HIT, LOAD, STREAM, HOST, LATE = range(5)
# note[RULE]: what makes an expert worth keeping
RECENCY, COUNT, RESIDENT_COUNT, SEGMENTS, FUTURE, SCORES, GIVEN, ARC, MATCHED, LAYER_AGE = range(10)
# note[WHERE]: where a miss runs
MOVE, ON_CPU, CHEAPEST, MAKESPAN, SCHEDULE = range(5)
# note[SOURCE]: what prefetch believes in
NOTHING, AHEAD, PREDICTED, TRUTH, MATCH, PATHS, IMPACT = range(7)

LOWEST = -1e300


class State(NamedTuple):
    """What a policy knows of its cache and of the event in progress."""

    real: np.ndarray
    cell: np.ndarray
    factor: np.ndarray
    layer: np.ndarray
    group: np.ndarray
    event: np.ndarray
    score: np.ndarray
    number: np.ndarray
    note: np.ndarray
    gone: np.ndarray


class Memory(NamedTuple):
    """What a policy has learnt before: a library of requests (MoE-Infinity) or of paths (EdgeMoE); else empty.

    `norms_PLN` [2, L + 1, N]: one over the squared norm of a request's first layers. `dots_N`: products with the running one.
    """

    library_PLEN: np.ndarray
    norms_PLN: np.ndarray
    dots_N: np.ndarray
    filled_P: np.ndarray
    keys_P: np.ndarray
    next_PM: np.ndarray
    usual_LM: np.ndarray


def new_memory(layers: int, experts: int, requests: int = 0) -> Memory:
    """An empty memory; the library has a half for prefill and a half for decoding."""
    return Memory(
        np.zeros((2, layers, experts, requests)),
        np.zeros((2, layers + 1, requests)),
        np.zeros(requests),
        np.zeros(2, np.int64),
        np.zeros(0, np.int64),
        np.zeros((0, 1), np.int64),
        np.zeros((layers, 0), np.int64),
    )


def new_state(experts_L: np.ndarray, bytes_L: np.ndarray, bytes_LE: np.ndarray, capacity_G: np.ndarray, whole: bool) -> State:
    """An empty cache of `capacity_G` bytes for each layer, or, where `whole`, for all together."""
    layers, experts = len(experts_L), int(max(experts_L))
    state = State(
        real=np.zeros((REALS, layers, experts)),
        cell=np.zeros((CELLS, layers, experts), np.int64),
        factor=np.zeros((FACTORS, layers)),
        layer=np.zeros((LAYERS, layers), np.int64),
        group=np.zeros((GROUPS, len(capacity_G)), np.int64),
        event=np.zeros((EVENTS, experts), np.int64),
        score=np.zeros((2, experts)),
        number=np.zeros(NUMBERS),
        note=np.zeros(NOTES, np.int64),
        gone=np.zeros((layers * experts, 2), np.int64),
    )
    state.layer[EXPERTS], state.layer[BYTES], state.cell[SIZE] = experts_L, bytes_L, bytes_LE
    state.layer[GROUP] = 0 if whole else np.arange(layers)
    state.layer[STALE] = 1
    state.cell[USED_AT] = state.cell[GUARD] = -1
    state.factor[SCALE] = 1
    state.group[CAPACITY] = state.group[ROOM] = capacity_G
    state.number[[GAIN, GROWTH]] = 1
    state.note[[ADMIT, PINS, WHOLE]] = 1, 1, int(whole)
    state.note[BEST] = -1
    return state
