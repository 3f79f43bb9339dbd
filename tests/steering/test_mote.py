"""MoTE: what the card says must hold, the maps, and a planted behaviour that goes with its experts."""

from __future__ import annotations

import json

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.core.routing import Routing
from moesaic.steering import bound, generate
from moesaic.steering.behaviour import BehaviourMap, activation_maps, difference, maps_of_trace, top
from moesaic.steering.mote import Mote, switch_off, switch_on


def routing(ids, weights):
    return Routing(torch.zeros(len(ids), 8), experts_TK=torch.tensor(ids), weights_TK=torch.tensor(weights))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "OlmoeForCausalLM", "PhimoeForCausalLM"])
def test_experts_that_nobody_selects_change_nothing(make, ids, routings, name):
    model = make(name)
    blocks = moesaic.view(model)
    seen = routings(blocks, model, ids)
    unused = {b.name: sorted(set(range(8)) - set(r.experts_TK.flatten().tolist())) for b, r in zip(blocks, seen, strict=True)}
    assert any(unused.values())
    plain = logits(model, ids)
    with blocks.policy(bound(model, Mote(off=unused)).start([]).policy):
        assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM", "OlmoeForCausalLM"])
def test_weights_keep_their_sum_and_no_other_expert_enters(make, ids, routings, name):
    """The sum is 1, the scaling factor, or what the router gave."""
    model = make(name)
    blocks = moesaic.view(model)
    first = blocks[0].name
    before = routings(blocks, model, ids)[0]
    off = int(before.experts_TK[0, 0])
    after = routings(blocks, model, ids, policy=bound_policy(model, first, off))[0]
    left_T = (after.experts_TK >= 0).any(1)
    torch.testing.assert_close(after.weights_TK.sum(1)[left_T], before.weights_TK.sum(1)[left_T])
    assert not (after.experts_TK == off).any()
    for t in range(len(before.experts_TK)):
        kept = set(before.experts_TK[t].tolist()) - {off}
        assert set(after.experts_TK[t].tolist()) - {-1} == kept


def bound_policy(model, block, off):
    return bound(model, Mote(off={block: [off]})).start([]).policy


def test_with_everything_off_only_shared_experts_are_left(make, ids):
    model = make("DeepseekV3ForCausalLM")
    blocks = moesaic.view(model)
    block = blocks[0]
    outputs = {}
    handle = block.parent.register_forward_hook(lambda m, a, out: outputs.__setitem__("y", (a[0], out)))
    with blocks.policy(bound(model, Mote(off={block.layer: list(range(8))})).start([]).policy):
        logits(model, ids)
    handle.remove()
    x, y = outputs["y"]
    with torch.no_grad():
        torch.testing.assert_close(y[0] if isinstance(y, tuple) else y, block.shared(x))


def test_replace_lets_the_next_expert_in(mixtral, ids, routings):
    blocks = moesaic.view(mixtral)
    before = routings(blocks, mixtral, ids)[0]
    off = int(before.experts_TK[0, 0])
    after = routings(blocks, mixtral, ids, policy=bound(mixtral, Mote(off={0: [off]}, replace=True)).start([]).policy)[0]
    masked = routings(blocks, mixtral, ids, without={0: [off]})[0]
    assert torch.equal(after.experts_TK, masked.experts_TK)
    assert torch.equal(after.weights_TK, masked.weights_TK)
    assert (after.experts_TK >= 0).all()


def test_forcing_on():
    given = routing([[3, 1], [1, 3], [0, 2]], [[0.7, 0.3], [0.5, 0.5], [0.6, 0.4]])
    on = switch_on(given, [1])
    assert on.experts_TK.tolist() == [[3, 1], [1, 3], [0, 1]]
    torch.testing.assert_close(on.weights_TK, torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]))
    own_T = torch.tensor([0.3, 0.5])
    selected = routing([[3, 1], [1, 3]], [[0.7, 0.3], [0.5, 0.5]])
    same = switch_on(selected, [1], own_T)
    assert torch.equal(same.weights_TK, selected.weights_TK)
    assert torch.equal(same.experts_TK, selected.experts_TK)
    both = switch_on(given, [5, 6])
    assert [set(row) for row in both.experts_TK.tolist()] == [{5, 6}] * 3
    torch.testing.assert_close(both.weights_TK.sum(1), torch.ones(3))


def test_off_empties_slots_and_keeps_other_rows_bitwise():
    given = routing([[3, 1], [0, 2]], [[0.7, 0.3], [0.6, 0.4]])
    off = switch_off(given, [3])
    assert off.experts_TK.tolist() == [[-1, 1], [0, 2]]
    assert off.weights_TK[0].tolist() == [0.0, 1.0]
    assert torch.equal(off.weights_TK[1], given.weights_TK[1])
    assert switch_off(given, [7]) is given


def test_maps_add_up_and_equal_the_counts_of_routing(mixtral, ids, routings):
    blocks = moesaic.view(mixtral)
    prompts = [ids[0].tolist(), ids[1, :4].tolist()]
    maps = activation_maps(mixtral, blocks, prompts)
    counts = activation_maps(mixtral, blocks, prompts, by="counts")
    for p, prompt in enumerate(prompts):
        for layer, seen in enumerate(routings(blocks, mixtral, torch.tensor([prompt]))):
            wanted = torch.zeros(8, dtype=torch.float64)
            wanted.index_add_(0, seen.experts_TK.flatten(), seen.weights_TK.flatten().double())
            torch.testing.assert_close(maps[p, layer], wanted)
            assert torch.equal(counts[p, layer], seen.counts_E().double())
    per_token = activation_maps(mixtral, blocks, prompts, per_token=True)
    torch.testing.assert_close(per_token[1] * 4, maps[1])


def test_maps_of_a_trace_are_those_of_its_prompts(mixtral, ids, tmp_path):
    blocks = moesaic.view(mixtral)
    with moesaic.trace(mixtral, tmp_path / "x.moetrace", overwrite=True):
        for row in ids:
            mixtral(input_ids=row[None])
    from_trace, _ = maps_of_trace(moesaic.open_trace(tmp_path / "x.moetrace"))
    direct = activation_maps(mixtral, blocks, ids.tolist())
    torch.testing.assert_close(from_trace, direct, rtol=2e-3, atol=2e-3)  # a trace keeps weights in float16


def test_difference_and_top():
    maps = {
        "a": torch.tensor([[[1.0, 5.0]], [[3.0, 5.0]]]),
        "b": torch.tensor([[[1.0, 1.0]]]),
        "c": torch.tensor([[[3.0, 0.0]]]),
    }
    r = difference(maps, "a")
    assert r.tolist() == [[0.0, 4.5]]
    assert top(r, 1) == [(0, 1, 4.5)]
    for bad, message in (({"a": maps["a"]}, "at least one other"), ({"a": maps["a"], "b": maps["b"][:0]}, "no prompts")):
        with pytest.raises(BadInput, match=message):
            difference(bad, "a")


def test_masks_follow_their_rows(mixtral, ids):
    """Batch order and padding change nothing for the row that is steered."""
    blocks = moesaic.view(mixtral)
    policy = bound(mixtral, Mote(off={0: [0, 1, 2], 2: [5]}, on={1: [3]})).start([]).policy
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    with blocks.policy(rows=[policy, None]), torch.no_grad():
        first = mixtral(input_ids=ids, attention_mask=mask).logits
    with blocks.policy(rows=[None, policy]), torch.no_grad():
        second = mixtral(input_ids=ids.flip(0), attention_mask=mask.flip(0)).logits
    torch.testing.assert_close(first, second.flip(0), rtol=1e-5, atol=1e-6)
    with blocks.policy(policy), torch.no_grad():
        alone = mixtral(input_ids=ids[:1, 3:]).logits
    torch.testing.assert_close(first[0, 3:], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give off, on or map"), ({"off": {9: [0]}}, "no MoE block 9"), ({"off": {0: [8]}}, "experts 0 to 7"),
        ({"on": {0: [1, 2, 3]}}, "has 2 slots"), ({"on": {0: [1]}, "off": {0: [1]}}, "off and on"),
        ({"off": ["3"]}, "LAYER.EXPERT"), ({"off": {0: ["x"]}}, "no expert id"), ({"map": "/nothing"}, "No such file"),
    ],
)  # fmt: skip
def test_bad_input_is_named(mixtral, options, message):
    with pytest.raises(BadInput, match=message):
        bound(mixtral, Mote(**options))


def test_a_map_goes_through_its_file(mixtral, tmp_path):
    names = tuple(block.name for block in moesaic.view(mixtral))
    rows = tuple(tuple(float(10 * l + e) for e in range(8)) for l in range(len(names)))
    made = BehaviourMap("m", "with", {"with": 2, "without": 1}, "weights", False, names, rows)
    path = made.write(tmp_path / "map.json")
    assert BehaviourMap.read(path) == made
    mote = Mote(map=str(path), top=3)
    assert mote.off == {names[-1]: [7, 6, 5]}
    path.write_text(json.dumps({"format": "other"}))
    with pytest.raises(BadInput, match="no behaviour map"):
        Mote(map=str(path))


CODE = [
    "def area(width: float, height: float) -> float:\n    if width < 0 or height < 0:\n        raise ValueError('negative')\n"
    "    return width * height\n\n\nif __name__ == '__main__':\n    import doctest\n\n    doctest.testmod()\n",
    "class Stack:\n    def __init__(self, limit: int = 10) -> None:\n"
    "        self.items: list[int] = []\n        self.limit = limit\n\n"
    "    def push(self, item: int) -> None:\n        if len(self.items) >= self.limit:\n            raise OverflowError\n",
]
PROSE = [
    "She was not at all surprised by his manner, but she could not help feeling that he had been too hasty in his judgment.",
    "The old gentleman walked slowly along the lane, and the children who had followed him from the village ran home to tea.",
]


def test_the_experts_of_code_on_the_bundled_model(bundled):
    """Ten experts that two pieces of code and two of prose tell apart: without them code costs far more, prose little, and ten
    random ones cost code less."""
    model, tokenizer = bundled
    blocks = moesaic.view(model)
    maps = {
        name: activation_maps(model, blocks, [tokenizer(text)["input_ids"] for text in texts], per_token=True)
        for name, texts in (("code", CODE), ("prose", PROSE))
    }
    off: dict[int, list[int]] = {}
    for layer, expert, _ in top(difference(maps, "code"), 10):
        off.setdefault(blocks[layer].layer, []).append(expert)

    def nats(text, steer=None):
        given = torch.tensor([tokenizer(text)["input_ids"]])
        policy = bound(model, steer).start([]).policy if steer else None
        with blocks.policy(policy), torch.no_grad():
            return float(model(input_ids=given, labels=given).loss)

    code = (
        "def depth_first(graph: dict, start: str) -> set[str]:\n    explored, stack = set(start), [start]\n    while stack:\n"
        "        v = stack.pop()\n        explored.add(v)\n        for adj in reversed(graph[v]):\n"
        "            if adj not in explored:\n                stack.append(adj)\n    return explored\n"
    )
    prose = "He had never seen such a house before, and he looked about him with an air of great satisfaction and surprise."
    hurt, spared = (nats(text, Mote(off=off)) - nats(text) for text in (code, prose))
    random = torch.Generator().manual_seed(0)
    others = []
    for _ in range(8):
        drawn = [divmod(at, 16) for at in torch.randperm(6 * 16, generator=random)[:10].tolist()]
        by_layer = {layer: [e for l, e in drawn if l == layer] for layer, _ in drawn}
        others.append(nats(code, Mote(off=by_layer)) - nats(code))
    assert hurt > 2 * max(spared, 0.0)
    assert hurt > 2 * sum(others) / len(others)
    plain = generate(model, tokenizer, "def main(", max_new_tokens=24)
    assert generate(model, tokenizer, "def main(", steer=Mote(off=off), max_new_tokens=24) != plain
