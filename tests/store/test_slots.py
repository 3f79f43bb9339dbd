"""Slots: they hold what is written, hand out touched memory first, and give memory back."""

from __future__ import annotations

import pytest
import torch

from moesaic.store import Slots


def test_slots_hold_matrices_apart():
    slots = Slots([(4, 3), (3, 2)], torch.bfloat16, 5)
    assert [tuple(t.shape) for t in slots.tensors] == [(5, 4, 3), (5, 3, 2)]
    assert all(t.is_contiguous() and t.dtype == torch.bfloat16 for t in slots.tensors)
    taken = [slots.take() for _ in range(5)]
    assert sorted(taken) == list(range(5))
    for s in taken:
        slots.tensors[0][s], slots.tensors[1][s] = s, -s
    assert all((slots.tensors[0][s] == s).all() and (slots.tensors[1][s] == -s).all() for s in taken)
    with pytest.raises(IndexError):
        slots.take()
    slots.give(taken[2])
    assert slots.take() == taken[2]


def test_memory_is_taken_late_and_given_back():
    import resource

    def rss():
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * resource.getpagesize()

    before = rss()
    slots = Slots([(1 << 20,), (1 << 20,)], torch.float32, 64)  # 512 MiB if it were all touched
    assert rss() - before < 32 << 20
    held = [slots.take() for _ in range(8)]
    for s in held:
        slots.tensors[0][s] = slots.tensors[1][s] = 1
    assert rss() - before > 56 << 20
    assert slots.touched_bytes == 8 * slots.slot_bytes == 64 << 20
    for s in held[:6]:
        slots.give(s)
    slots.trim()
    assert slots.touched_bytes == 2 * slots.slot_bytes
    assert rss() - before < 32 << 20
    assert all((slots.tensors[1][s] == 1).all() for s in held[6:])
    assert slots.used == 2
