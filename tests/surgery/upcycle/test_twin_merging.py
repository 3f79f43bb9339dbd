"""Twin-Merging: what the card says must hold of the shared model, the differences, and their factored application."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import moesaic  # noqa: F401 - registers the classes
from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.models.upcycled.twin_merging import Difference
from moesaic.surgery.conversion import Told
from moesaic.surgery.convert import convert, plan_conversion
from moesaic.surgery.upcycle.twin_merging import compress, shared

TEXTS = {
    "code": [Document("def add(x, y):\n    return x + y\n" * 12, "code")],
    "tale": [Document("Once upon a time there was a little fox who lived in the wood. " * 12, "tale")],
}
IDS = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(folder, tmp_path):
    def run(tasks=2, **options):
        sources = [folder("qwen3", seed, tokenizer=True) for seed in range(tasks + 1)]
        told = Told(texts=TEXTS, seq_len=32)
        given = {"tasks": ["code", "tale"][:tasks], "epochs": 3, **options}
        convert(sources, tmp_path / "out", "twin_merging", given, told=told)
        return [AutoModelForCausalLM.from_pretrained(path).eval() for path in (*sources, tmp_path / "out")]

    return run


@torch.no_grad()
@pytest.mark.parametrize("mode", ["svd", "magnitude", "bernoulli"])
def test_density_1_and_one_hot_weights_are_the_task_and_none_is_the_shared_model(mode, made, near):
    """Card (a), (b)."""
    *sources, twin = made(density=1.0, mode=mode, scale=0.5)
    for m in range(2):
        twin.task_weights.forced = torch.eye(2)[m : m + 1]
        assert near(twin(IDS).logits, sources[1 + m](IDS).logits) < 1e-4
    twin.task_weights.forced = torch.zeros(1, 2)
    merged, states = copy.deepcopy(sources[0]), [model.state_dict() for model in sources]
    merged.load_state_dict({name: shared(states, name, 0.5) for name in states[0]})
    assert near(twin(IDS).logits, merged(IDS).logits) < 1e-6


def test_one_task_merged_whole_leaves_no_difference(made):
    """Card (c)."""
    *_, twin = made(tasks=1, scale=1.0, mode="magnitude", density=1.0)
    assert all(p.abs().max() == 0 for name, p in twin.twins.named_parameters() if "values" in name or "vector" in name)


def test_random_keeping_is_unbiased():
    """Card (d): over many draws the mean is the difference."""
    matrix, random = torch.randn(6, 5), torch.Generator().manual_seed(0)
    total = torch.zeros(6, 5)
    for _ in range(3000):
        twin = Difference("sparse", 1, 6, 5, 9)
        compress(twin, 0, matrix, "bernoulli", random)
        total += twin.dense(0)
    assert (total / 3000 - matrix).abs().max() < 0.15


@torch.no_grad()
@pytest.mark.parametrize("mode", ["svd", "magnitude"])
def test_a_batch_in_factors_is_the_merge_of_each_sample(mode, made, near):
    """Card (e): samples of other weights in one batch, against parameters that are really merged."""
    *sources, twin = made(density=0.3, mode=mode)
    weights = torch.tensor([[0.7, 0.3], [0.1, 0.9]])
    with twin.task_weights.using(weights):
        hidden = twin.model(IDS).last_hidden_state
        found = twin.lm_head(hidden)
    own = {name: p for name, p in twin.state_dict().items() if not name.startswith(("twins", "task_router"))}
    for b in range(2):
        merged = copy.deepcopy(sources[0])
        state = dict(own)
        for key, part in twin.twins.items():
            name = key.replace("/", ".") + ".weight"
            each = [part.dense(m) if isinstance(part, Difference) else part["vector_MD"][m] for m in range(2)]
            state[name] = own[name] + sum(w * d for w, d in zip(weights[b], each, strict=True))
        merged.load_state_dict(state)
        assert near(found[b], merged(IDS[b : b + 1]).logits[0]) < 1e-4


def test_svd_error_falls_with_density():
    """Card (f)."""
    matrix, errors = torch.randn(12, 9), []
    for rank in range(1, 10):
        twin = Difference("svd", 1, 12, 9, rank)
        compress(twin, 0, matrix, "svd", torch.Generator())
        errors.append(float((twin.dense(0) - matrix).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_the_router_decides_once_per_answer(made):
    *_, twin = made()
    with_cache = twin.generate(IDS, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    weights = with_cache.past_key_values.task_weights_BM
    assert weights.shape == (2, 2) and torch.allclose(weights.sum(1), torch.ones(2))
    first = twin(IDS[:, :4], use_cache=True)
    with pytest.raises(BadInput, match="does not know its tasks"):
        twin(IDS[:, 4:5], past_key_values=first.past_key_values)


@pytest.mark.parametrize(
    ("options", "domains", "match"),
    [
        ({"tasks": ["a"]}, 2, "one name for each of the 2 models"),
        ({"mode": "sign"}, 2, "one of svd"),
        ({"density": 0}, 2, "density=0"),
        ({"tasks": ["a", "b"]}, 0, "reads text of 1 domain"),
    ],
)
def test_what_cannot_apply_stops_at_planning(options, domains, match, folder):
    with pytest.raises(BadInput, match=match):
        plan_conversion([folder("qwen3", seed) for seed in range(3)], "twin_merging", options, domains)
