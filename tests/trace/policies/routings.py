"""Small traces with Zipf popularity and Markov locality, as real routing has and independent draws have not."""

from __future__ import annotations

import numpy as np

from moesaic.core import registry
from moesaic.trace.file import from_arrays
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies.policy import Shape
from moesaic.trace.replay import history_of, replay

NAMES = [entry.name for entry in registry.entries("policies")]
HOST = Hardware("test", 1e9, 0.0, 1e11, 1e13, 0.0, 2e10, 1e12, 0.0)
SIZE = 1 << 20


def ids_of(seed=0, tokens=60, layers=3, experts=8, k=2, stay=0.6, skew=1.0):
    """Choices [T, L, K], best first."""
    rng = np.random.default_rng(seed)
    popularity = np.log(1 / np.arange(1, experts + 1) ** skew)
    names = np.stack([rng.permutation(experts) for _ in range(layers)])
    out, last = np.zeros((tokens, layers, k), np.int64), None
    for t in range(tokens):
        score = popularity + rng.gumbel(size=(layers, experts))
        if last is not None:
            kept = np.take_along_axis(score, last, 1) + 3 * (rng.random((layers, k)) < stay)
            np.put_along_axis(score, last, kept, 1)
        last = np.argsort(-score, 1)[:, :k]
        out[t] = np.take_along_axis(names, last, 1)
    return out


def trace_of(seed=0, tokens=60, layers=3, experts=8, k=2, decode=True, lengths=None, signals=True, sizes=None, **kw):
    """A trace with every signal that a policy reads: its look-ahead is right four times of five."""
    ids = ids_of(seed, tokens, layers, experts, k, **kw)
    rng = np.random.default_rng(seed + 1)
    given = {}
    if signals:
        ahead = np.full((tokens, layers, 2, min(experts, 2 * k)), 255)
        for d in (1, 2):
            for l in range(layers - d):
                for t in range(tokens):
                    others = rng.permutation([e for e in range(experts) if e not in ids[t, l + d]])
                    right = np.concatenate([ids[t, l + d], others])
                    ahead[t, l, d - 1] = (right if rng.random() < 0.8 else rng.permutation(experts))[: ahead.shape[3]]
        logits = rng.normal(size=(tokens, layers, experts))
        np.put_along_axis(logits, ids, 3 + np.sort(rng.random(ids.shape))[..., ::-1], 2)
        given = {"ahead_TLAM": ahead, "logits_TLE": logits, "tokens_T": ids[:, 0, 0] * experts + ids[:, 0, -1]}
    lengths = [tokens // 3, tokens - tokens // 3] if lengths is None else lengths
    trace = from_arrays(ids, experts, lengths=lengths, decode=decode, expert_bytes=SIZE, **given)
    if sizes is not None:
        rows = tuple(layer._replace(expert_bytes=size) for layer, size in zip(trace.layers, sizes, strict=True))
        object.__setattr__(trace.header, "layers", rows)
    return trace


def shape_of(layers=3, experts=8, k=2, size=SIZE):
    return Shape(np.full(layers, experts), np.full(layers, size), k)


def build(name, **options):
    if name == "expertflow":
        options.setdefault("steps", 3)
    return registry.get("policies", name).build(**options)


def run(trace, policy, slots, hardware=HOST, **kw):
    """Replay with a cache of so many experts in all; policies that learn, learn from the trace itself."""
    policy = build(policy) if isinstance(policy, str) else policy
    history = history_of(trace, 1.0)[0] if policy.learns and "history" not in kw else kw.pop("history", None)
    return replay(trace, policy, slots * int(trace.bytes_L.max()), hardware, history=history, **kw)
