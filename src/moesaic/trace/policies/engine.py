"""One event from end to end, as compiled code: what the replay's loop and a live engine's `Policy` object both call."""

from __future__ import annotations

from moesaic.core.compiled import compiled
from moesaic.trace.policies import state as S
from moesaic.trace.policies.cache import bring_in, look_up, settle, touch
from moesaic.trace.policies.schedule import choose_where


@compiled
def begin_step(c, m, fresh, prefill):
    """A forward pass begins: `fresh` where a request does, `prefill` where it reads many tokens at once."""
    c.note[S.STEP] += 1
    c.note[S.STEP_SERIAL] = c.note[S.SERIAL] + 1
    if c.number[S.GROWTH] != 1.0:
        c.number[S.GAIN] *= c.number[S.GROWTH]
        if c.number[S.GAIN] > 1e200:
            c.real[S.KEEP] /= c.number[S.GAIN]
            c.number[S.GAIN] = 1.0
            c.layer[S.STALE] = 1


@compiled
def decide(c, m, hw, l, n, tokens):
    """Say what becomes of the event's experts (`event[ACT]`, `event[ON_HOST]`), and who leaves (`gone[:note[GONE]]`).

    The event lies in c.event[IDS], [TOKENS] and, where the future is known, [NEXT]; `tokens` are those of the pass.
    """
    look_up(c, l, n)
    touch(c, l, n)
    choose_where(c, hw, l, n, tokens)
    bring_in(c, l, n, tokens)
    settle(c, l)
