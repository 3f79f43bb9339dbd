"""One event from end to end, as compiled code: what the replay's loop and a live engine's `Policy` object both call."""

from __future__ import annotations

from moesaic.trace.policies import state as S
from moesaic.trace.policies.cache import bring_in, look_up, settle, touch
from moesaic.trace.policies.learned import EPSILON, begin_request, follow_path, observe_request, smooth_scores
from moesaic.trace.policies.loops import compiled, inlined
from moesaic.trace.policies.schedule import choose_where, two_ended


@compiled
def _rescale(c):
    for l in range(c.layer.shape[1]):
        for e in range(c.layer[S.EXPERTS, l]):
            c.real[S.KEEP, l, e] /= c.number[S.GAIN]
        c.layer[S.STALE, l] = 1
    c.number[S.GAIN] = 1.0


@inlined
def begin_step(c, m, fresh, prefill):
    """A forward pass begins: `fresh` where a request does, `prefill` where it reads many tokens at once."""
    c.note[S.STEP] += 1
    c.note[S.STEP_SERIAL] = c.note[S.SERIAL] + 1
    if c.number[S.GROWTH] != 1.0:
        c.number[S.GAIN] *= c.number[S.GROWTH]
        if c.number[S.GAIN] > 1e200:
            _rescale(c)
    if c.note[S.RULE] == S.MATCHED and (fresh or int(prefill) != c.note[S.PHASE]):
        begin_request(c, m, int(prefill))


@inlined
def decide(c, m, hw, l, n, tokens):
    """Say what becomes of the event's experts (`event[ACT]`, `event[ON_HOST]`), and who leaves (`gone[:note[GONE]]`).

    The event lies in c.event[IDS], [TOKENS] and, where the future is known, [NEXT], its scores in c.score[0]; `tokens` are
    those of the pass.
    """
    rule = c.note[S.RULE]
    if rule == S.MATCHED:
        observe_request(c, m, l, n)
    elif rule == S.SCORES:
        smooth_scores(c, l)
    elif rule == S.LAYER_AGE:
        layers = c.layer.shape[1]
        for i in range(layers):
            ahead = (i - l) % layers
            c.factor[S.SCALE, i] = 1.0 / (ahead if ahead else layers)
    look_up(c, l, n)
    touch(c, l, n)
    choose_where(c, hw, l, n, tokens)
    bring_in(c, l, n, tokens)
    settle(c, l)


@compiled
def plan(c, m, l, n, tokens):
    """After the event of layer l (-1: before the first), set out what could be fetched. WANT rows were laid out before."""
    if c.note[S.SOURCE] == S.PATHS:
        follow_path(c, m, l, n, tokens == 1)
    c.note[S.AT] = l
    c.note[S.CURSOR_D] = 1
    c.note[S.CURSOR] = 0
    layers = c.layer.shape[1]
    for d in range(1, c.note[S.DEPTH] + 1):
        target = l + d
        if target >= layers:
            if not c.note[S.WRAP]:
                break
            target -= layers
        for j in range(c.layer[S.WANTED, target]):
            c.cell[S.GUARD, target, c.cell[S.WANT, target, j]] = c.note[S.SERIAL] + 1


@compiled
def skip_layer(c):
    """Nothing more can be fetched for the layer at hand, or at all where candidates are not taken layer by layer."""
    ranked = c.note[S.SOURCE] == S.MATCH or c.note[S.SOURCE] == S.IMPACT
    c.note[S.CURSOR_D] = c.note[S.DEPTH] + 1 if ranked else c.note[S.CURSOR_D] + 1
    c.note[S.CURSOR] = 0


@compiled
def next_fetch(c, m, hw):
    """Layer and expert to fetch next, best first; (-1, -1) when there is nothing more. Then `reserve` it."""
    l = c.note[S.AT]
    layers = c.layer.shape[1]
    if c.note[S.SOURCE] == S.MATCH:
        return _best_match(c, l)
    if c.note[S.SOURCE] == S.IMPACT:
        return _most_impact(c, hw, l)
    while c.note[S.CURSOR_D] <= c.note[S.DEPTH]:
        target = l + c.note[S.CURSOR_D]
        if target >= layers:
            if not c.note[S.WRAP]:
                break
            target -= layers
        while c.note[S.CURSOR] < c.layer[S.WANTED, target]:
            e = c.cell[S.WANT, target, c.note[S.CURSOR]]
            c.note[S.CURSOR] += 1
            if c.cell[S.RESIDENT, target, e] == S.ABSENT:
                return target, e
        skip_layer(c)
    return -1, -1


@compiled
def _best_match(c, l):
    """MoE-Infinity: the matched request's share of an expert, less the further its layer is ahead."""
    best_l = -1
    best = -1
    value = 0.0
    layers = c.layer.shape[1]
    if c.note[S.BEST] < 0 or c.note[S.CURSOR_D] > c.note[S.DEPTH]:
        return -1, -1
    for i in range(l + 1, min(layers, l + 1 + c.note[S.DEPTH])):
        near = 1.0 - (i - l) / layers
        for e in range(c.layer[S.EXPERTS, i]):
            v = c.real[S.KEEP, i, e] * near
            if v > value and c.cell[S.RESIDENT, i, e] == S.ABSENT and c.real[S.KEEP, i, e] > 2 * EPSILON:
                best_l, best, value = i, e, v
    return best_l, best


@compiled
def _most_impact(c, hw, l):
    """HybriMoE: the candidate whose residency shortens the simulated schedule of its layer most."""
    best_l = -1
    best = -1
    gain = 0.0
    layers = c.layer.shape[1]
    if c.note[S.CURSOR_D] > c.note[S.DEPTH]:
        return -1, -1
    for target in range(l + 1, min(layers, l + 1 + c.note[S.DEPTH])):
        n = c.layer[S.WANTED, target]
        missing = 0
        for i in range(n):
            e = c.cell[S.WANT, target, i]
            c.event[S.TOKENS, i] = c.cell[S.VOTED, target, i]
            c.event[S.NEXT, i] = int(c.cell[S.RESIDENT, target, e] != S.ABSENT)
            missing += 1 - c.event[S.NEXT, i]
        if missing == 0:
            continue
        size = c.layer[S.BYTES, target]
        now = two_ended(hw, size, c.event[S.TOKENS], c.event[S.NEXT], n, c.event[S.RANK], c.event[S.ON_HOST])
        tried = -1
        for i in range(n):
            if c.event[S.NEXT, i] or c.event[S.TOKENS, i] == tried:  # of equal loads the first is the most wanted
                continue
            tried = c.event[S.TOKENS, i]
            c.event[S.NEXT, i] = 1
            then = two_ended(hw, size, c.event[S.TOKENS], c.event[S.NEXT], n, c.event[S.RANK], c.event[S.ON_HOST])
            c.event[S.NEXT, i] = 0
            if now - then > gain:
                best_l, best, gain = target, c.cell[S.WANT, target, i], now - then
    return best_l, best
