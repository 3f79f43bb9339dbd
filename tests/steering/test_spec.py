"""How steering is written, and what is refused by name; several methods on one answer; batches whose rows differ."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput, UnknownMethod
from moesaic.steering import Steering, bound, generate, steered, steering, write
from moesaic.steering.mote import Mote
from moesaic.steering.naee_skip import NaeeSkip
from moesaic.view import Policy


def test_text_json_and_objects_are_the_same():
    a = steering('mote:off={"3": [1, 2]},weight=2').methods[0]
    b = steering({"steer": {"mote": {"off": {"3": [1, 2]}, "weight": 2}}}).methods[0]
    assert isinstance(a, Mote) and isinstance(b, Mote)
    assert a.off == b.off == {3: [1, 2]}
    assert a.weight == b.weight == 2
    many = steering(["naee_skip:beta=0.5", {"k": {"0": 1}, "threshold": 0.2}])
    assert isinstance(many.methods[0], NaeeSkip)
    assert many.policy == Policy(k={0: 1}, threshold=0.2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mote:of=1", "no option 'of'"), ("naee_skip", "beta is missing"), ("mote:off", "no option=value"),
        ({"ks": 1}, "no field 'ks'"), ({"probs": [1.0]}, "no field 'probs'"), ({"steer": ["mote"]}, 'give {"method"'),
        ([{"k": 1}, {"k": 2}], "k is set twice"), ("scmoe:beta=much", "wrong kind"), ("rewiring:steps=1000000", "out of range"),
        ({"steer": {"scmoe": {"beta": None}}}, "wrong kind"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(BadInput, match=message):
        steering(spec)


def test_an_unknown_method_lists_those_that_exist():
    with pytest.raises(UnknownMethod, match="mote"):
        steering("mott")


def test_a_server_s_files_are_known_by_name_only(tmp_path):
    with pytest.raises(BadInput, match="no file of this server; it has refusals"):
        steering({"steer": {"mote": {"map": "/etc/passwd"}}}, files={"refusals": "/x"})


def test_a_file_option_takes_a_name(tmp_path):
    with pytest.raises(BadInput, match="no file of this server"):
        steering({"steer": {"mote": {"map": ["a"]}}}, files={"a": "/x"})


def test_no_steering_is_generate(mixtral, ids):
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(write(mixtral, ids, Steering(), **options), mixtral.generate(ids, **options))
    torch.manual_seed(3)
    sampled = mixtral.generate(ids, max_new_tokens=8, do_sample=True, temperature=0.9)
    torch.manual_seed(3)
    assert torch.equal(write(mixtral, ids, bound(mixtral, None), max_new_tokens=8, do_sample=True, temperature=0.9), sampled)


def test_rows_of_a_batch_follow_their_own(mixtral, ids):
    mote = bound(mixtral, Mote(off={0: [0, 1, 2, 3], 1: [4, 5]}))
    skip = bound(mixtral, ["naee_skip:beta=1.0", {"k": 2}])
    options = {"max_new_tokens": 8, "do_sample": False}
    both = write(mixtral, ids, [mote, skip], **options)
    for row, one in enumerate((mote, skip)):
        assert torch.equal(both[row], write(mixtral, ids[row : row + 1], one, **options)[0])
    assert not torch.equal(both, mixtral.generate(ids, **options))


def test_a_with_block_steers_generate(mixtral, ids):
    spec = {"steer": {"mote": {"off": {0: [0, 1, 2, 3], 1: [4, 5]}}}}
    with steered(mixtral, spec, rows=2):
        inside = mixtral.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(inside, write(mixtral, ids, bound(mixtral, spec), max_new_tokens=8, do_sample=False))


def test_generate_gives_text(bundled):
    model, tokenizer = bundled
    plain = generate(model, tokenizer, "Once upon a time", max_new_tokens=12)
    assert generate(model, tokenizer, "Once upon a time", {"k": 2}, max_new_tokens=12) == plain
    assert generate(model, tokenizer, "Once upon a time", {"rank": 2}, max_new_tokens=12) != plain
    with pytest.raises(BadInput, match="empty"):
        generate(model, tokenizer, "")


def test_a_dense_model_has_nothing_to_steer():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    for spec in ({"k": 1}, "naee_skip:beta=0.1"):
        with pytest.raises(BadInput, match="dense"):
            bound(model, spec)


def test_every_method_is_registered_with_its_card():
    from moesaic.core import registry

    for entry in registry.entries("steering"):
        assert entry.paper and entry.card.startswith("surgery-and-steering.md#")
        assert moesaic.__version__
        assert entry.build.__doc__
