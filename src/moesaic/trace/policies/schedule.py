"""Where the experts of one layer run, and how long that takes: device, host and link as three timelines.

Experts come in the event's order: most tokens first. A resident expert can start at once; a missing one is moved first,
one after another, or runs on the host where its weights lie.
"""

from __future__ import annotations

import numpy as np

from moesaic.core.compiled import compiled
from moesaic.trace import hardware as H
from moesaic.trace.policies import state as S


@compiled
def t_move(hw, size):
    return hw[H.LINK_WAIT] + size / hw[H.LINK_BW]


@compiled
def t_gpu(hw, n, size):
    return hw[H.DEVICE_WAIT] + max(size / hw[H.DEVICE_BW], n * 2.0 * size / hw[H.WIDTH] / hw[H.DEVICE_FLOPS])


@compiled
def t_cpu(hw, n, size):
    if hw[H.HOST_FLOPS] == 0.0 or hw[H.HOST_BW] == 0.0:
        return np.inf
    return hw[H.HOST_WAIT] + max(size / hw[H.HOST_BW], n * 2.0 * size / hw[H.WIDTH] / hw[H.HOST_FLOPS])


@compiled
def here(act):
    return act == S.HIT


@compiled
def timelines(c, hw, l, n, late):
    """Seconds until the layer's last expert is done, those that the device works, those that the link is busy.

    `late`: bytes still to come of an expert that was on its way when it was needed.
    """
    size = c.layer[S.BYTES, l]
    gpu = 0.0
    cpu = 0.0
    work = 0.0
    for i in range(n):
        if c.event[S.ON_HOST, i]:
            cpu += t_cpu(hw, c.event[S.TOKENS, i], size)
        elif here(c.event[S.ACT, i]):
            gpu += t_gpu(hw, c.event[S.TOKENS, i], size)
    work = gpu
    link = 0.0
    for turn in range(2):  # what is already on its way arrives first
        for i in range(n):
            act = c.event[S.ACT, i]
            if c.event[S.ON_HOST, i] or here(act) or (act == S.LATE) != (turn == 0):
                continue
            link += late / hw[H.LINK_BW] if act == S.LATE else t_move(hw, size)
            t = t_gpu(hw, c.event[S.TOKENS, i], size)
            gpu = max(gpu, link) + t
            work += t
    return max(gpu, cpu), work, link


@compiled
def choose_where(c, hw, l, n, tokens):
    """Mark in event[ON_HOST] what runs on the host, by the policy's rule."""
