"""Without Numba the loops run as plain Python; both give the same numbers."""

from __future__ import annotations

import importlib

import pytest
from awkward_traces import TRACES, same, take

LOOPS = {
    "srp": ["srp.slide"],
    "sch": ["sch.simulate", "sch.favourites", "ahead._leave", "ahead._enter"],
    "reuse": ["reuse.stack", "reuse.absences"],
    "drops": ["drops.overflow"],
    "specialisation": ["groups.tally"],
}


@pytest.mark.parametrize("measure", list(LOOPS))
@pytest.mark.parametrize("name", ["three experts", "holes", "unequal layers", "encoder and decoder"])
def test_both_give_the_same(measure, name, monkeypatch):
    compiled = take(measure, TRACES[name], resamples=5)
    for loop in LOOPS[measure]:
        module, function = loop.split(".")
        module = importlib.import_module(f"moesaic.trace.statistics.{module}")
        monkeypatch.setattr(module, function, getattr(module, function).py_func)
    same(compiled, take(measure, TRACES[name], resamples=5))
