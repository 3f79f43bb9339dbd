"""What every registered statistic earns by existing: it is run on every awkward trace, printed, repeated and read in blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from awkward_traces import same, take

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.trace import segments
from moesaic.trace.file import Trace, from_arrays, open_trace
from moesaic.trace.statistics import bootstrap, rows
from moesaic.trace.statistics.result import Statistic

NAMES = [entry.name for entry in registry.entries("statistics")]


def weighed(trace):
    """The trace with weights, logits and look-ahead, so that every measure has what it reads."""
    rng = np.random.default_rng(0)
    tokens, layers, slots = trace.experts_TLK.shape
    columns = dict(trace.columns) | {"weights": rng.random((tokens, layers, slots)).astype(np.float16)}
    columns["logits"] = rng.normal(size=(tokens, layers, trace.num_experts)).astype(np.float16)
    named = np.argsort(rng.random((tokens, layers, 2, int(trace.experts_L.min()))), -1)[..., : 2 * slots]
    columns["ahead"] = named.astype(trace.experts_TLK.dtype)
    return Trace(trace.header, columns)


def test_the_family_is_complete():
    assert set(NAMES) >= {
        "affinity", "balance", "coactivation", "drops", "foresight", "load", "margin", "reuse", "saturation", "sch",
        "specialisation", "srp",
    }  # fmt: skip
    for entry in registry.entries("statistics"):
        assert entry.build.__module__ == f"moesaic.trace.statistics.{entry.name}"


@pytest.mark.parametrize("name", NAMES)
def test_every_awkward_trace_has_a_result_that_is_json(name, awkward):
    trace = weighed(awkward)
    found = take(name, trace, resamples=20)
    assert isinstance(found, Statistic)
    text = json.dumps([found.to_json(), found.summary(), found.by_layer()], allow_nan=False)
    assert json.loads(text)
    assert len(found.by_layer()) <= len(trace.layers)
    same(found, take(name, trace, resamples=20))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"affinity", "specialisation"}))  # whose random draws go by block
def test_reading_in_small_blocks_from_a_mapped_file_changes_nothing(name, awkward, tmp_path, monkeypatch):
    trace = weighed(awkward)
    with (tmp_path / "a.moetrace").open("wb") as stream:
        segments.append(stream, trace.columns, trace.header.metadata())
    whole = take(name, trace, resamples=20)
    monkeypatch.setattr(rows.sequences, "__defaults__", (10,))
    same(whole, take(name, open_trace(tmp_path / "a.moetrace"), resamples=20), exact=False)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"affinity", "specialisation"}))
def test_sequences_that_share_a_unit_of_resampling_add_up(name, monkeypatch):
    rng = np.random.default_rng(0)
    kind = {"lengths": [2, 3] * 600, "domain_S": np.arange(1200) % 2, "domains": ["a", "b"]}
    trace = weighed(from_arrays(rng.integers(0, 5, (3000, 2, 1)), 5, **kind))
    whole = take(name, trace, resamples=0)
    monkeypatch.setattr(bootstrap, "MOST_UNITS", 7)
    monkeypatch.setattr(rows.sequences, "__defaults__", (100,))
    same(whole, take(name, trace, resamples=0), exact=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_trace_is_only_read(name, awkward):
    trace = weighed(awkward)
    for column in trace.columns.values():
        column.flags.writeable = False
    take(name, trace, resamples=5)


@pytest.mark.parametrize("name", NAMES)
def test_empty_slots_alone_give_nothing_rather_than_an_error(name):
    nothing = from_arrays(np.full((40, 2, 2), -1), 4, lengths=[20, 20], tokens_T=np.zeros(40, int))
    found = take(name, weighed(nothing), resamples=5)
    json.dumps([found.to_json(), found.summary(), found.by_layer()], allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_of_no_tokens_is_refused(name):
    some = weighed(from_arrays(np.zeros((4, 1, 1), int), 2, tokens_T=np.zeros(4, int)))
    columns = {key: column[:0] for key, column in some.columns.items()}
    with pytest.raises(BadInput, match="holds no tokens"):
        take(name, Trace(some.header, columns))


@pytest.mark.parametrize("name", NAMES)
def test_an_id_that_is_no_expert_is_refused_before_any_loop_runs_on_it(name):
    some = weighed(from_arrays(np.zeros((40, 2, 1), int), [3, 9], tokens_T=np.zeros(40, int)))
    some.experts_TLK[30, 0] = 5
    with pytest.raises(BadInput, match=r"expert 5 at layers\.0, which has 3"):
        take(name, some)
