"""Awkward traces, and readers as slow as they are plain, for the tests of statistics."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from moesaic.core import registry
from moesaic.trace.file import Header, Trace, TraceLayer, from_arrays
from moesaic.trace.statistics.result import Statistic


def sets(tokens, layers, experts, k, rng, sticky=0.0):
    """Random K-subsets [T, L, K]; with `sticky`, a token repeats the one before it that often."""
    x = np.argsort(rng.random((tokens, layers, experts)), -1)[..., :k]
    for t in np.flatnonzero(rng.random(tokens) < sticky):
        x[t] = x[max(t - 1, 0)]
    return x


def _awkward():
    """Name and trace: one token, one expert for all, few and many experts, K of 1 and 8, holes, short sequences."""
    rng = np.random.default_rng(7)
    holes = sets(90, 2, 6, 3, rng, 0.5)
    holes[rng.random(holes.shape) < 0.3] = -1
    holes[40:44] = -1
    unequal = np.stack([sets(60, 1, 3, 2, rng)[:, 0], sets(60, 1, 9, 2, rng)[:, 0]], 1)
    return {
        "one token": from_arrays(sets(1, 2, 3, 1, rng), 3, tokens_T=[5]),
        "one expert": from_arrays(np.full((50, 1, 1), 2), 3, lengths=[30, 20], tokens_T=np.arange(50) % 7),
        "three experts": from_arrays(sets(100, 2, 3, 2, rng, 0.7), 3, lengths=[5, 60, 35], tokens_T=np.arange(100) % 5),
        "top-8": from_arrays(sets(200, 2, 64, 8, rng, 0.5), 64, lengths=[1, 99, 100], tokens_T=np.arange(200) % 9),
        "300 experts": from_arrays(sets(120, 2, 300, 2, rng, 0.8), 300, lengths=[40] * 3, tokens_T=np.arange(120) % 3),
        "holes": from_arrays(holes, 6, lengths=[20, 3, 67], tokens_T=np.arange(90) % 4),
        "empty domain": from_arrays(
            sets(80, 1, 5, 2, rng), 5, lengths=[30, 50], domain_S=[0, 2], domains=["a", "none", "c"], tokens_T=np.arange(80) % 6
        ),
        "unequal layers": from_arrays(unequal, [3, 9], lengths=[25, 35], tokens_T=np.arange(60) % 8),
        "encoder and decoder": streams(rng),
    }


def streams(rng):
    """Two layers of an encoder and one of a decoder; sequences take turns."""
    x = sets(100, 3, 8, 2, rng, 0.5)
    lengths, stream_S = [30, 20, 30, 20], np.array([0, 1, 0, 1])
    encoder_T = np.repeat(stream_S, lengths) == 0
    x[encoder_T, 2:] = -1
    x[~encoder_T, :2] = -1
    layers = tuple(TraceLayer(f"{name}.{i}", 8, 2, 0, name) for name, i in (("encoder", 0), ("encoder", 1), ("decoder", 0)))
    trace = from_arrays(x, 8, lengths=lengths, header=Header(layers), tokens_T=np.arange(100) % 5)
    columns = dict(trace.columns)
    columns["sequences"] = np.stack([np.full(4, -1), stream_S], 1).astype(np.int32)
    return Trace(trace.header, columns)


def own(trace, layer):
    """Numbers of the sequences that a layer sees."""
    stream = trace.streams.index(trace.layers[layer].stream)
    return [s for s in range(len(trace.domain_S)) if trace.stream_S[s] == stream]


def chosen(trace, layer, sequence):
    """A list of sets: the experts of each token of a sequence."""
    a, b = trace.starts_S1[sequence : sequence + 2]
    return [{int(e) for e in row if e != trace.empty} for row in trace.experts_TLK[a:b, layer]]


def take(name, trace, **options):
    """Run a measure with those of the options that it knows; saturation against the trace itself."""
    build = registry.get("statistics", name).build
    known = registry.get("statistics", name).parameters
    options = {key: value for key, value in options.items() if key in known}
    return build(trace, trace, **options) if name == "saturation" else build(trace, **options)


def same(one, two, exact=True):
    """Fail unless two results hold the same arrays."""
    for field in fields(one):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, Statistic):
            same(a, b, exact)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b) if exact else np.testing.assert_allclose(a, b, atol=1e-6)


TRACES = _awkward()
