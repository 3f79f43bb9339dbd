"""Card: layers-and-balancing.md, "ShinkaEvolve": the search, on fitnesses that are known, and a short real one."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch

from moesaic.balancing.language import parse
from moesaic.core.errors import BadInput
from moesaic.training.loss_fitness import ShortRuns, read_bytes
from moesaic.training.loss_proposers import Command, named
from moesaic.training.loss_search import Bandit, LossSearch, Settings, parent_weights
from moesaic.training.loss_trees import MOST, behaviour, change, cross, novel, propose, random_tree, replace, rewrite

SEED = "E * sum(f * P)"


def strength(text):
    """A known fitness: how near the push on the router is to that of a known loss, at its strength."""
    want = behaviour(parse("3 * E * sum(f * P)"))
    return {"fitness": -(behaviour(parse(text)) - want).norm().item()}


def test_parent_weights_share_equal_scores_by_children_and_prefer_the_best():
    weights = parent_weights([1.0, 1.0, 1.0], [0, 1, 3])
    assert weights == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    best = parent_weights([1.0, 2.0, 9.0], [0, 0, 0])
    assert best[2] > best[1] > best[0] and sum(best) == pytest.approx(1)
    assert all(w >= 0 for w in parent_weights([-1e9, 0.0, 0.1], [0, 0, 0]))


def test_a_bandit_with_one_arm_returns_it_and_with_two_learns():
    rng = random.Random(0)
    assert {Bandit(["a"]).pick(rng) for _ in range(20)} == {"a"}
    bandit = Bandit(["good", "bad"])
    picks = []
    for _ in range(200):
        arm = bandit.pick(rng)
        bandit.reward(arm, 1.0 if arm == "good" else -1.0, 0.0)
        picks.append(arm)
    assert picks[100:].count("good") > 60
    with pytest.raises(BadInput, match="at least one arm"):
        Bandit([])


def test_trees_keep_their_types_and_proposals_are_losses():
    rng = random.Random(1)
    for i in range(200):
        vector = bool(i % 2)
        tree = random_tree(rng, vector, 4)
        assert tree.vector == vector or not vector, "a vector place may hold a number, which spreads; not the reverse"
    parent = parse(SEED)
    kinds = []
    for _ in range(200):
        new, kind = propose(parent, [parse("sum(square(P))")], rng)
        assert parse(str(new)) == new and new != parent and len(new) <= MOST
        kinds.append(kind)
    assert {"diff", "rewrite", "crossover"} <= set(kinds)
    assert kinds.count("diff") > kinds.count("rewrite") > kinds.count("crossover")


def test_replacing_a_part_by_itself_changes_nothing():
    tree = parse("E * sum(f * P) + 0.1 * mean(relu(0.01 - P))")
    for i, part in enumerate(tree.walk()):
        assert replace(tree, i, part) == tree
    rng = random.Random(0)
    assert any(change(tree, rng) != tree for _ in range(5)) and len(rewrite(tree, rng)) >= 1
    assert not cross(tree, parse("sum(q)"), rng).vector


def test_novelty_is_about_what_a_loss_does():
    known = [behaviour(parse(SEED))]
    assert not novel(parse("sum(P * f) * E + 7 + sum(stop(f))"), known)
    assert not novel(parse("1.1 * E * sum(f * P)"), known)
    assert novel(parse("5 * E * sum(f * P)"), known)
    assert novel(parse("sum(square(P))"), known)
    assert not novel(parse("sum(P)"), []), "a push on all experts alike moves no softmax"


def test_the_search_improves_never_loses_its_best_and_goes_on_exactly(tmp_path):
    settings = Settings(generations=12, migrate_every=2)
    bests = []
    whole = LossSearch(strength, tmp_path / "whole", [SEED], settings)
    whole.run(lambda search: bests.append(search.best.fitness) if search.candidates else None)
    assert bests == sorted(bests) and bests[-1] > bests[0]
    assert any(c.also_on for c in whole.candidates), "islands exchange their best"

    class Stop(Exception):
        pass

    def stop(search):
        if len(search.candidates) == 17:
            raise Stop

    half = LossSearch(strength, tmp_path / "half", [SEED], settings)
    with pytest.raises(Stop):
        half.run(stop)
    journal = tmp_path / "half" / "journal.jsonl"
    journal.write_text(journal.read_text() + '{"index": 17, "te')  # killed while writing
    asked = []
    resumed = LossSearch(lambda text: asked.append(text) or strength(text), tmp_path / "half", [SEED], settings)
    resumed.run()
    assert [c.text for c in resumed.candidates] == [c.text for c in whole.candidates]
    assert len(asked) == len(whole.candidates) - 17
    with pytest.raises(BadInput, match="other settings"):
        LossSearch(strength, tmp_path / "half", [SEED], Settings(generations=15, seed=1))


def test_evolving_two_numbers_is_non_decreasing(tmp_path):
    """The card's small experiment: tau and weight of the discovered loss, by random changes."""

    def fitness(text):
        numbers = [part.value for part in parse(text).walk() if part.op == "number"]
        return {"fitness": -abs(numbers[0] - 0.5) - abs(numbers[1] - 0.3) if len(numbers) == 2 else -9.0}

    bests = []
    search = LossSearch(fitness, tmp_path, ["0.1 * sum(relu(0.01 - P))"], Settings(generations=20, islands=1))
    search.run(lambda s: bests.append(s.best.fitness) if s.candidates else None)
    assert bests == sorted(bests) and bests[-1] > bests[0]


def proposer(parent, context):
    """Plugged in by name; names the archive that it was told of."""
    assert context["archive"][0]["expression"] and "fitness" in context["archive"][0]
    return "E * sum(f * P) + 2 * sum(square(P))"


def test_proposers_are_plugged_in_and_bad_ones_do_no_harm(tmp_path):
    script = tmp_path / "answer.py"
    script.write_text(
        "import json, sys\nfor i, line in enumerate(sys.stdin):\n    asked = json.loads(line)\n"
        "    text = 'sum(nonsense)' if i % 2 else f\"{2 + i} * ({asked['parent']})\"\n"
        "    print(json.dumps({'expression': text}), flush=True)\n"
    )
    command = Command(f"{sys.executable} {script}")
    proposers = {"command": command, "function": proposer, "broken": lambda parent, context: "eval('1')"}
    search = LossSearch(strength, tmp_path / "run", [SEED], Settings(generations=20), proposers)
    search.run()
    command.close()
    by = {c.proposer for c in search.candidates if c.how == "proposed"}
    assert by == {"command", "function"} and search.rejected > 0
    for name in ("json:nothing", "no_such_module:f", "json"):
        with pytest.raises(BadInput, match="proposer"):
            named(name)
    with pytest.raises(BadInput, match="does not start"):
        Command("/nonexistent/program")("sum(P)", {})
    silent = Command(f"{sys.executable} -c 'import time; time.sleep(60)'", seconds=0.2)
    with pytest.raises(BadInput, match="said nothing"):
        silent("sum(P)", {})


def test_fitness_of_short_runs_is_exact_and_leaves_the_random_state(tiny_data):
    runs = ShortRuns(read_bytes(str(tiny_data)), steps=6, tail=3, experts=4, dim=16, length=16)
    before = torch.get_rng_state()
    first, again, none = runs(SEED), runs(SEED), runs.of({})
    assert first == again and torch.equal(before, torch.get_rng_state())
    assert first["fitness"] == pytest.approx(-(first["cross_entropy"] + first["imbalance"]))
    assert 0 <= first["imbalance"] <= 1 and none != first
    with pytest.raises(BadInput, match="tail=9"):
        ShortRuns(runs.text, steps=6, tail=9)


def test_the_command_searches_resumes_and_prints_json(tiny_data, tmp_path, capsys):
    from moesaic.cli.main import main

    args = ["search-loss", "--data", str(tiny_data), "--out", str(tmp_path / "run"), "--steps", "4", "--experts", "4"]
    seen = []
    for generations in ("1", "2"):
        with pytest.raises(SystemExit) as stop:
            main([*args, "--generations", generations, "--json"])
        assert not stop.value.code
        seen.append(json.loads(capsys.readouterr().out))
    assert [found["candidates"] for found in seen] == [4, 6]
    assert seen[1]["best"]["fitness"] >= seen[1]["seed"]["fitness"]
    parse(seen[1]["best"]["expression"])
    with pytest.raises(SystemExit) as stop:
        main([*args, "--start", "sum(x)"])
    assert stop.value.code == 2 and "no such name" in capsys.readouterr().err
