"""The SDM network: two halves of one softmax, training that moves mass between them, and answers of verified units only."""

from __future__ import annotations

import pytest
import torch
import transformers

from moesaic.core.errors import BadInput
from moesaic.serving.http.steering import Steering as Served
from moesaic.steering import bound, steering, write
from moesaic.steering.sdm import write_store
from moesaic.steering.sdm_head import NAMES, RIGHT, WRONG, Head, read_unit, train_head, unit_features
from moesaic.steering.sdm_model import SOFTMAX_Q, calibrate, sdm
from moesaic.steering.sdm_network import SdmNetwork
from moesaic.view import tiny

UNIT = 3


@pytest.fixture(scope="module")
def units():
    """Right units are of low tokens, wrong ones of high tokens, after the same prompts."""
    random = torch.Generator().manual_seed(0)

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=random).tolist()

    return [(draw(20, 60, 4), draw(8, 12, UNIT) if i % 2 else draw(70, 74, UNIT), i % 2) for i in range(860)]


@pytest.fixture(scope="module")
def mixtral():
    model = tiny.build(transformers.MixtralForCausalLM)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def trained(mixtral, units):
    return train_head(mixtral, units[:160], epochs=3, lr=0.1, batch=16, width=8, verify_epochs=4)


@pytest.fixture(scope="module")
def files(mixtral, units, trained, tmp_path_factory):
    """A store and a head whose rule admits low tokens alone."""
    head = trained[0]
    tmp_path = tmp_path_factory.mktemp("sdm_network")
    held = units[160:]
    with torch.no_grad():  # all in one call
        given = torch.tensor([[*prompt, *unit] for prompt, unit, _ in held])
        h = mixtral(input_ids=given, output_hidden_states=True).hidden_states[-1]
    x = torch.stack([head.features(row[3:-1], own[4:], row[-1]) for row, own in zip(h, given, strict=True)])
    torch.testing.assert_close(x[7], unit_features(mixtral, head, *held[7][:2]), rtol=1e-4, atol=1e-5)
    head.standardise(x)
    x = (x - head.shift_F) * head.scale_F
    label = torch.tensor([kind for *_, kind in held])
    rule = calibrate(x, label, 2, alpha=0.8, splits=1, epochs=30, lr=1e-2, width=8, rescale_epochs=5, rescale_lr=1e-3)
    store = write_store(tmp_path / "units.safetensors", rule, NAMES)
    return {"store": str(store), "head": str(head.write(tmp_path / "head.safetensors"))}


def test_at_softmax_both_halves_are_one_softmax_and_the_positive_half_is_the_model(mixtral, trained, units):
    head, _ = trained
    logits, h, _ = read_unit(mixtral, *units[0][:2])
    with torch.no_grad():
        plain = mixtral(input_ids=torch.tensor([[*units[0][0], *units[0][1]]])).logits[0, 3:6]
    torch.testing.assert_close(logits, plain)
    both = head.both(logits, h)
    count, size = logits.shape
    assert both.shape == (count, 2 * size)
    q, one = torch.full((count,), SOFTMAX_Q), torch.ones(count)
    torch.testing.assert_close(sdm(both, q, one), both.softmax(-1))
    negative = torch.arange(2 * size) < size
    masked = both.masked_fill(negative, float("-inf"))
    torch.testing.assert_close(sdm(masked, q, one)[:, size:], plain.softmax(-1))
    for similarity, distance in ((0.0, 0.1), (9.0, 0.7)):
        found = sdm(both, one * similarity, one * distance)
        assert torch.equal(found.argmax(-1), both.argmax(-1))
        assert torch.equal(found[:, size:].argmax(-1), plain.argmax(-1)), "the model's own choice in the positive half"
    fresh = Head.fresh(mixtral).both(logits, h).softmax(-1)
    torch.testing.assert_close(fresh[:, :size].sum(-1), torch.full((count,), 0.5))
    torch.testing.assert_close(head.odds(h, torch.tensor(units[0][1])), (both[:, size:] - both[:, :size])[
        torch.arange(count), units[0][1]])  # fmt: skip


def test_training_moves_mass_to_the_half_of_the_verdict_and_leaves_the_model(mixtral, trained, units):
    head, losses = trained
    assert len(losses) == 3
    fresh = tiny.build(transformers.MixtralForCausalLM)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in mixtral.state_dict().items())
    right, held = 0, units[160:240]
    for prompt, unit, kind in held:
        _, h, _ = read_unit(mixtral, prompt, unit)
        right += (float(head.odds(h, torch.tensor(unit)).mean()) > 0) == (kind == RIGHT)
    assert right >= 0.85 * len(held), "of units that taught nothing"


def test_answers_are_of_verified_units(mixtral, files):
    """What may be drawn is low tokens alone, or high ones."""
    low = {"suppress_tokens": [*range(8), *range(12, 128)], "do_sample": True, "pad_token_id": 0}
    high = {"suppress_tokens": [*range(70), *range(74, 128)], "do_sample": True, "pad_token_id": 0}
    prompt = torch.tensor([[30, 41, 52, 33]])
    steer = bound(mixtral, SdmNetwork(**files, unit=UNIT, redraws=8))
    torch.manual_seed(0)
    seen: list = []
    made = write(mixtral, prompt, steer, max_new_tokens=8, on_course=lambda found: seen.extend(found), **low)
    note = seen[-1].notes["sdm_network"]
    assert note["units"] >= 1 and note["redrawn"] >= 1
    assert made.shape[1] - 4 == min(8, note["units"] * UNIT), "no unit that failed stays"
    refused: list = []
    tries = bound(mixtral, SdmNetwork(**files, unit=UNIT, redraws=2))
    none = write(mixtral, prompt, tries, max_new_tokens=8, on_course=lambda found: refused.extend(found), **high)
    assert torch.equal(none, prompt), "no unit is verified, so nothing stays"
    assert "after 0 verified units" in refused[-1].refused and refused[-1].notes["sdm_network"]["redrawn"] == 2


def test_a_failed_unit_is_drawn_again_and_never_streamed(mixtral, files, monkeypatch):
    """Verdicts by hand: the first draw of the second unit fails, the second one passes."""
    from moesaic.steering import sdm_network
    from moesaic.steering.sdm_model import Verdict

    asked: list = []

    class Rule:
        fitted = SdmNetwork(**files).rule.fitted
        fails = 2

        def judge(self, x):
            passes = len(asked) != self.fails
            one = torch.ones(1)
            return Verdict(torch.tensor([RIGHT]), torch.tensor([passes]), one * 0.5, one, one, one)

    def features(model, head, before, unit):
        asked.append((list(before), list(unit)))
        return torch.zeros(len(head.shift_F))

    monkeypatch.setattr(sdm_network, "unit_features", features)
    method = SdmNetwork(**files, unit=UNIT, redraws=1)
    method.rule = Rule()

    values: list = []

    class Streamer:
        def put(self, value):
            values.extend(value.flatten().tolist())

        def end(self):
            values.append("end")

    prompt = torch.tensor([[30, 41, 52, 33]])
    torch.manual_seed(1)
    made = write(
        mixtral, prompt, bound(mixtral, method), max_new_tokens=7, do_sample=True, pad_token_id=0, streamer=Streamer()
    )[0].tolist()
    assert len(made) == 11, "what was taken back does not count"
    assert values == [*made, "end"]
    assert [len(unit) for _, unit in asked] == [3, 3, 3, 1], "the last, shorter unit is verified too"
    assert asked[1][0] == asked[2][0] == made[:7] and asked[1][1] != asked[2][1] == made[7:10]
    Rule.fails = 0
    padded, mask = torch.tensor([[0, 0, 30, 41, 52, 33]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    asked.clear()
    write(mixtral, padded, bound(mixtral, method), attention_mask=mask, max_new_tokens=3, pad_token_id=0)
    assert asked[0][0] == [30, 41, 52, 33], "padding is no text"
    how = {"max_new_tokens": 7, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(1)
    whole = write(mixtral, prompt, bound(mixtral, method), **how)
    torch.manual_seed(1)
    assert torch.equal(whole, mixtral.generate(prompt, **how)), "verified text is the model's own"


def test_files(mixtral, files, trained, units, tmp_path):
    head = Head.read(files["head"])
    assert torch.equal(head.weight_VD, trained[0].weight_VD)
    for prompt, unit, _ in units[:2]:
        assert torch.equal(unit_features(mixtral, head, prompt, unit), unit_features(mixtral, trained[0], prompt, unit))
    (tmp_path / "bad").write_bytes(b"12345678")
    for name in (str(tmp_path / "bad"), str(tmp_path / "none"), files["store"]):
        with pytest.raises(BadInput, match="no head of an SDM network"):
            Head.read(name)
    with pytest.raises(BadInput, match="no SDM store"):
        SdmNetwork(store=files["head"], head=files["head"])


def test_what_cannot_be_is_refused(make, mixtral, files, trained, units, tmp_path):
    for options in ({"unit": 0}, {"redraws": -1}):
        with pytest.raises(BadInput, match="at least"):
            SdmNetwork(**files, **options)
    other = Head(torch.zeros(9, 5), torch.zeros(9), torch.zeros(6), torch.ones(6)).write(tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="train it again"):
        bound(mixtral, SdmNetwork(files["store"], str(other)))
    with pytest.raises(BadInput, match="0 right units"):
        train_head(mixtral, [unit for unit in units if unit[2] == WRONG])
    with pytest.raises(BadInput, match="a token before it"):
        read_unit(mixtral, [], [1])
    import moesaic

    given = {"steer": {"sdm_network": files}}
    with pytest.raises(BadInput, match="takes text back"):
        Served(given, moesaic.view(mixtral), steering, mixtral)
