"""There and back: NumPy, Parquet, vLLM and SGLang."""

from __future__ import annotations

import base64
from types import SimpleNamespace

import numpy as np
import pytest

from moesaic.core.errors import BadInput
from moesaic.trace.convert import from_npz, from_parquet, to_npz, to_parquet
from moesaic.trace.engines import from_sglang, from_vllm, to_sglang, to_vllm
from moesaic.trace.file import from_arrays


def make(experts=8, slots=2, **options):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, experts, (13, 3, slots))
    ids[2, 1, slots - 1] = -1
    ids[5, 0] = -1
    defaults = {
        "lengths": [4, 6, 3], "domains": ["a", "b"], "domain_S": [0, 1, -1], "tokens_T": rng.integers(0, 50, 13),
        "weights_TLK": np.where(ids < 0, 0, rng.random(ids.shape)), "decode": True,
    }  # fmt: skip
    return from_arrays(ids, experts, **(defaults | options))


def same(one, other):
    assert one.header == other.header
    for name in one.columns:
        assert np.array_equal(one.columns[name], other.columns[name]), name


@pytest.mark.parametrize("options", [{}, {"experts": 300, "slots": 5}, {"decode": False}])
def test_npz_there_and_back(options, tmp_path):
    trace = make(**options)
    to_npz(trace, tmp_path / "a.npz")
    same(from_npz(tmp_path / "a.npz"), trace)


def test_plain_arrays_in_npz(tmp_path):
    np.savez(tmp_path / "a.npz", experts=np.ones((5, 2, 2), int), num_experts=4)
    trace = from_npz(tmp_path / "a.npz")
    assert (len(trace), trace.num_experts) == (5, 4)
    np.savez(tmp_path / "b.npz", other=np.ones(3))
    with pytest.raises(BadInput, match="no array `experts`"):
        from_npz(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(BadInput, match=r"c\.npz"):
        from_npz(tmp_path / "c.npz")


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", experts=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BadInput, match="NumPy archive"):
        from_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("options", [{}, {"experts": 300, "slots": 5}, {"decode": False}])
def test_parquet_there_and_back(options, tmp_path):
    pytest.importorskip("pyarrow")
    trace = make(**options)
    to_parquet(trace, tmp_path / "a.parquet")
    same(from_parquet(tmp_path / "a.parquet"), trace)


def test_parquet_is_a_table_others_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    to_parquet(make(), tmp_path / "a.parquet")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    trace = make()
    assert len(rows) == 13 * 3
    row = rows[4 * 3 + 1]
    assert (row["sequence"], row["position"], row["layer"], row["domain"]) == (1, 0, 1, "b")
    assert row["experts"] == trace.experts_TLK[4, 1].tolist()
    assert rows[5 * 3]["experts"] == []


def test_other_tables_are_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"sequence": [0], "layer": [0]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="no column 'experts'"):
        from_parquet(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"sequence": [0, 0], "layer": [1, 0], "experts": [[0], [1]]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="in order"):
        from_parquet(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"x" * 50)
    with pytest.raises(BadInput, match="Parquet"):
        from_parquet(tmp_path / "c.parquet")


def request(prompt, answer, layers=4, slots=2, experts=8, dense=(0,), seed=0):
    ids = np.random.default_rng(seed).integers(1, experts, (prompt + answer - 1, layers, slots))
    ids[:, list(dense)] = 0
    out = SimpleNamespace(routed_experts=ids, token_ids=list(range(100, 100 + answer)))
    return SimpleNamespace(prompt_token_ids=list(range(prompt)), outputs=[out]), ids


def test_vllm_requests():
    (one, ids), (two, _) = request(5, 4), request(2, 3, seed=1)
    trace = from_vllm([one, two], 8)
    assert trace.lengths_S.tolist() == [8, 4]
    assert [layer.name for layer in trace.layers] == ["layers.1", "layers.2", "layers.3"]
    assert np.array_equal(trace.experts_TLK[:8], ids[:, 1:])
    assert trace.tokens_T[:8].tolist() == [0, 1, 2, 3, 4, 100, 101, 102]
    assert trace.runs_N4.tolist() == [[0, 0, 5, 5], [0, 1, 3, 1], [1, 4, 2, 2], [1, 5, 2, 1]]
    back = to_vllm(trace, hidden_layers=4)
    assert np.array_equal(back[0], ids)
    assert len(back) == 2


def test_vllm_arrays_and_errors():
    ids = request(5, 4)[1]
    assert len(from_vllm([ids, ids], 8)) == 16
    with pytest.raises(BadInput, match="enable_return_routed_experts"):
        from_vllm([SimpleNamespace(prompt_token_ids=[1], outputs=[SimpleNamespace(routed_experts=None, token_ids=[])])], 8)
    with pytest.raises(BadInput, match="has 4"):
        from_vllm([ids], 4)
    with pytest.raises(BadInput, match="no requests"):
        from_vllm([], 4)
    with pytest.raises(BadInput, match="moe_layers"):
        from_vllm([ids], 8, moe_layers=[9])


def test_sglang_responses():
    ids = request(5, 4)[1]
    text = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    trace = from_sglang([{"text": "", "meta_info": {"routed_experts": text, "prompt_tokens": 5}}], 4, 2, 8)
    assert np.array_equal(trace.experts_TLK, ids[:, 1:])
    assert trace.runs_N4.tolist() == [[0, 0, 5, 5], [0, 1, 3, 1]]
    assert to_sglang(trace, hidden_layers=4) == [text]
    assert len(from_sglang([text], 4, 2, 8)) == 8


@pytest.mark.parametrize(
    ("response", "words"), [({"meta_info": {}}, "return_routed_experts"), ("AAAA", "no array"), ("no base64!", "no array")]
)
def test_bad_sglang_responses(response, words):
    with pytest.raises(BadInput, match=words):
        from_sglang([response], 4, 2, 8)
