"""C3PO: nothing at alpha 1, neighbours that agree, the simplex, gradients of the selected, only the listed layers and token."""

from __future__ import annotations

import pytest
import torch

import moesaic
from moesaic.core.errors import BadInput
from moesaic.steering import bound, write
from moesaic.steering.c3po import C3po, average, gaussian, mean_shift, within
from moesaic.steering.references import References, collect, look, right
from moesaic.view.course import finish


def whole(method, omega, near, weight):
    """L(omega), every neighbour's prompt read whole."""
    return sum(method.loss(omega, i) * k for i, k in zip(near, weight, strict=True)) / weight.sum()


@pytest.fixture
def olmoe(make):
    return make("OlmoeForCausalLM")


@pytest.fixture
def store(olmoe):
    blocks = moesaic.view(olmoe)
    random = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(6):
        prompt = torch.randint(8, 80, (9,), generator=random).tolist()
        with torch.no_grad():
            logits = olmoe(input_ids=torch.tensor([prompt])).logits[0, -1]
        rows.append((prompt, [int(logits.argmax())], None))
    rows.append((rows[0][0], [7], None))  # a wrong answer
    return collect(olmoe, blocks, rows, "tiny")


def test_the_store_holds_right_answers_only(olmoe, store, tmp_path):
    assert len(store) == 6
    assert not right(olmoe, store.prompts[0], [7], None)
    assert right(olmoe, store.prompts[0], store.answers[0], [[7], list(store.answers[0])])
    torch.testing.assert_close(store.pathway_nLE.sum(-1), torch.ones(6, 4))
    again = References.read(store.write(tmp_path / "x.safetensors"))
    assert again.prompts == store.prompts and again.answers == store.answers and again.blocks == store.blocks
    assert torch.equal(again.pathway_nLE, store.pathway_nLE) and torch.equal(again.embedding_nM, store.embedding_nM)
    (tmp_path / "bad").write_bytes(b"1234567890")
    for path in (tmp_path / "bad", tmp_path / "none"):
        with pytest.raises(BadInput, match=r"store|no such file"):
            References.read(path)


def test_alpha_one_is_the_model_bit_for_bit(olmoe, store, ids):
    steer = bound(olmoe, C3po(store, alpha=1.0, leak=1.0))
    greedy = olmoe.generate(ids[:1], max_new_tokens=6, do_sample=False)
    assert torch.equal(write(olmoe, ids[:1], steer, max_new_tokens=6, do_sample=False), greedy)
    method = steer.methods[0]
    own_LE, _ = look(olmoe, steer.blocks, ids[0].tolist())
    with steer.blocks.policy(rows=[method.policy(own_LE)]), torch.no_grad():  # the policy itself is neutral too
        assert torch.equal(olmoe(input_ids=ids[:1]).logits, olmoe(input_ids=ids[:1]).logits)


def test_replacing_by_the_own_pathway_changes_nothing(olmoe, store, ids):
    steer = bound(olmoe, C3po(store))
    own_LE, _ = look(olmoe, steer.blocks, ids[0].tolist())
    with torch.no_grad():
        plain = olmoe(input_ids=ids[:1]).logits
        with steer.blocks.policy(rows=[steer.methods[0].policy(own_LE)]):
            assert torch.equal(olmoe(input_ids=ids[:1]).logits, plain)


def test_averages():
    random = torch.Generator().manual_seed(0)
    own = torch.rand(2, 8, generator=random).softmax(-1)
    theirs = torch.rand(3, 2, 8, generator=random).mul(4).softmax(-1)
    weight = gaussian(torch.tensor([0.1, 0.4, 0.7]))
    everywhere = torch.ones(2, 8, dtype=torch.bool)
    mean = average(theirs, weight)
    torch.testing.assert_close(mean.sum(-1), torch.ones(2))
    torch.testing.assert_close(average(theirs[:1], weight[:1]), theirs[0])
    same = own.expand(3, -1, -1)
    torch.testing.assert_close(within(own, average(same, weight), everywhere), own)
    torch.testing.assert_close(mean_shift(own, same, 0.3, 5, everywhere), own)
    shifted = mean_shift(own, theirs, 0.5, 4, everywhere)
    torch.testing.assert_close(shifted.sum(-1), torch.ones(2))
    assert (shifted >= 0).all()
    core = torch.zeros(2, 8, dtype=torch.bool)
    core[:, :3] = True
    some = within(own, mean, core)
    torch.testing.assert_close(some.sum(-1), torch.ones(2))
    torch.testing.assert_close(some[:, 3:] / own[:, 3:], (some[:, 3:4] / own[:, 3:4]).expand(-1, 5))


def test_regression_by_hand(olmoe, store, ids):
    """k = 1 and alpha 0: the reference's pathway takes the place of the prompt's, whole."""
    steer = bound(olmoe, C3po(store, alpha=0.0, neighbours=1, core=8, leak=1.0))
    method = steer.methods[0]
    own_LE, vector = look(olmoe, steer.blocks, ids[0].tolist())
    near, weight = method.near(vector)
    assert near == [int((store.embedding_nM @ vector).argmax())]
    moved, _ = finish(method.moved(own_LE, near, weight))
    torch.testing.assert_close(moved, store.pathway_nLE[near[0]])


def test_only_listed_layers_and_the_last_token_differ(olmoe, store, ids):
    steer = bound(olmoe, C3po(store, alpha=0.0, layers=2, leak=1.0))
    blocks = steer.blocks
    course = steer.start(ids[0].tolist())
    seen = {"plain": [], "steered": []}
    for name, policy in (("plain", None), ("steered", course.policy)):
        with blocks.policy(rows=[policy]), blocks.on_route(lambda r, b, name=name: seen[name].append(r)), torch.no_grad():
            olmoe(input_ids=ids[:1])
    for layer, (a, b) in enumerate(zip(seen["plain"], seen["steered"], strict=True)):
        same_T = torch.isclose(a.weights_TK, b.weights_TK, atol=1e-6).all(1)  # products of other sizes round differently
        assert same_T[:-1].all()
        assert bool(same_T[-1]) == (layer < 2), layer
    first = bound(olmoe, C3po(store, alpha=0.0, layers=2, leak=1.0, where="first")).start(ids[0].tolist()).policy
    assert list(first.probs) == [block.name for block in list(blocks)[:2]]
    leaked = bound(olmoe, C3po(store, leak=1e-3)).start(ids[0].tolist())
    assert leaked.policy is None or leaked.notes["c3po_neighbours"] > 0


def test_gradient_is_of_the_selected_experts_only(olmoe, store):
    """Finite differences of L inside the selected set, in float64; zero outside."""
    model = olmoe.double()
    method = bound(model, C3po(store, layers=2)).methods[0]
    near, weight = [0, 1], torch.tensor([1.0, 0.5])
    omega = store.pathway_nLE[2, 2:].clone()
    given = omega.clone().requires_grad_()
    (slope,) = torch.autograd.grad(whole(method, given, near, weight), given)
    chosen = torch.zeros_like(omega, dtype=torch.bool).scatter(1, omega.topk(2, -1).indices, True)
    assert (slope[~chosen] == 0).all()
    assert (slope[chosen] != 0).all()
    step = 5e-4
    for layer, expert in chosen.nonzero().tolist():
        up, down = omega.clone(), omega.clone()
        up[layer, expert] += step
        down[layer, expert] -= step
        with torch.no_grad():  # not scaled to 1 again: the loss is a function of these numbers
            losses = [float(whole(method, w, near, weight)) for w in (up, down)]
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(slope[layer, expert]), rel=0.05, abs=1e-6)


@pytest.mark.parametrize("name", ["OlmoeForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM"])
def test_a_prompt_read_before_is_a_prompt_read_whole(make, name, ids):
    """The cache of all but the last token serves every omega, gradients included, and stays as it is."""
    model = make(name)
    blocks = moesaic.view(model)
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=2, do_sample=False)[:, ids.shape[1] :].tolist()
    made = collect(model, blocks, list(zip(ids.tolist(), answer, [None] * 2, strict=True)))
    method = bound(model, C3po(made, leak=1.001)).methods[0]
    omega = made.pathway_nLE[1, method.span].clone().requires_grad_()
    prefix = finish(method.prefix(0))
    assert prefix is not None
    for _ in range(2):
        (slope,) = torch.autograd.grad(method.loss(omega, 0, prefix), omega)
    (wanted,) = torch.autograd.grad(method.loss(omega, 0), omega)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.loss(omega, 0, prefix), method.loss(omega, 0))


def test_descent_lowers_the_neighbours_loss(olmoe, store, ids):
    method = bound(olmoe, C3po(store, "ngd", lr=0.05, leak=1.0, core=8)).methods[0]
    own_LE, vector = look(olmoe, method.blocks, ids[0].tolist())
    near, weight = method.near(vector)
    moved, _ = finish(method.moved(own_LE[method.span], near, weight))
    with torch.no_grad():
        before, after = (float(whole(method, w, near, weight)) for w in (own_LE[method.span], moved))
    assert after < before
    torch.testing.assert_close(moved.sum(-1), torch.ones(len(moved)))
    with torch.inference_mode():
        made = write(olmoe, ids[:1], bound(olmoe, C3po(store, "ngd", leak=1.0)), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 10)


def test_line_search_takes_the_least_loss(olmoe, store, ids):
    method = bound(olmoe, C3po(store, leak=1.0)).methods[0]
    own_LE, vector = look(olmoe, method.blocks, ids[0].tolist())
    own_LE = own_LE[method.span]
    near, weight = method.near(vector)
    moved, alpha = finish(method.moved(own_LE, near, weight))
    with torch.no_grad():
        best = float(whole(method, moved, near, weight))
        for other in (0.0, 0.3, 0.7, 1.0):
            method.alpha = other
            assert best <= float(whole(method, finish(method.moved(own_LE, near, weight))[0], near, weight)) + 1e-6
    assert 0 <= alpha <= 1


def test_what_cannot_be_is_refused(make, olmoe, store, ids):
    for options in ({"alpha": 2.0}, {"how": "best"}, {"neighbours": 0}, {"kernel": "x"}, {"where": "middle"}):
        with pytest.raises(BadInput, match="c3po"):
            C3po(store, **options)
    with pytest.raises(BadInput, match="core 99"):
        bound(olmoe, C3po(store, core=99))
    other = make("DeepseekV3ForCausalLM")  # whose first layer is dense
    with pytest.raises(BadInput, match="build them again"):
        bound(other, C3po(store))
    sigmoid = make("Glm4MoeForCausalLM")
    blocks = moesaic.view(sigmoid)
    prompt = ids[0].tolist()
    with torch.no_grad():
        answer = [int(sigmoid(input_ids=ids[:1]).logits[0, -1].argmax())]
    made = collect(sigmoid, blocks, [(prompt, answer, None)], "sigmoid")
    with pytest.raises(BadInput, match="does not score by a softmax"):
        write(sigmoid, ids[:1], bound(sigmoid, C3po(made, alpha=0.0, leak=1.001)), max_new_tokens=1)
