"""Evolution of balance losses: islands, an archive, parents by fitness, proposers by bandit; every step on disk.

After ShinkaEvolve (2509.19349; layers-and-balancing.md#shinkaevolve), with trees of `balancing/language.py` in the place of
programs and random changes in the place of a language model, which may be plugged in as one more proposer.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from moesaic.balancing.language import Node, parse
from moesaic.core.errors import BadInput
from moesaic.training.loss_trees import behaviour, novel, propose

Proposer = Callable[[str, dict[str, Any]], str]
"""(the parent's text, what is known) -> an expression. Raises BadInput when it has none to give."""


class Fitness(Protocol):
    """Trains with an expression. Returns at least `fitness` (higher is better, always finite)."""

    def __call__(self, text: str) -> dict[str, float]: ...


@dataclass(frozen=True)
class Settings:
    """Numbers of the search; defaults are the card's, but for migration, which the released code leaves at 0."""

    generations: int = 30
    islands: int = 2
    archive: int = 40
    elite: float = 0.3
    exploit: float = 0.2
    migrate_every: int = 10
    migrate: float = 0.1
    attempts: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.generations, self.islands, self.archive, self.attempts, self.migrate_every) < 1:
            raise BadInput(f"{self}: generations, islands, archive, attempts and migrate_every are at least 1")
        if not (0 <= self.exploit <= 1 and 0 <= self.migrate <= 1 and 0 < self.elite <= 1):
            raise BadInput(f"{self}: exploit, migrate and elite are shares")


@dataclass
class Candidate:
    """One loss that was tried: a line of the journal."""

    index: int
    text: str
    island: int
    parent: int | None
    how: str
    proposer: str
    result: dict[str, float]
    also_on: list[int] = field(default_factory=list)
    """Islands that it migrated to."""

    @property
    def fitness(self) -> float:
        return self.result["fitness"]


def parent_weights(fitness: Sequence[float], children: Sequence[int]) -> list[float]:
    """sigmoid(10 (a - median) / max(MAD, 1e-6)) / (1 + children), summing to 1."""
    middle = _median(fitness)
    spread = max(_median([abs(a - middle) for a in fitness]), 1e-6)
    weights = []
    for a, count in zip(fitness, children, strict=True):
        z = min(max(10 * (a - middle) / spread, -60.0), 60.0)
        weights.append(1 / (1 + math.exp(-z)) / (1 + count))
    total = sum(weights)
    return [w / total for w in weights]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Bandit:
    """Asymmetric UCB over proposers: reward exp(max(gain, 0)) - 1 over the largest seen, statistics fading by 0.95."""

    def __init__(self, arms: Sequence[str], c: float = 1.0, epsilon: float = 0.2, decay: float = 0.95):
        if not arms:
            raise BadInput("a bandit needs at least one arm")
        self.arms, self.c, self.epsilon, self.decay = list(arms), c, epsilon, decay
        self.sums, self.counts, self.most = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0), 0.0

    def pick(self, rng: random.Random) -> str:
        untried = [arm for arm in self.arms if self.counts[arm] < 1e-9]
        if untried or rng.random() < self.epsilon:
            return rng.choice(untried or self.arms)
        total = sum(self.counts.values())

        def bound(arm: str) -> float:
            mean = self.sums[arm] / self.counts[arm] / max(self.most, 1e-12)
            return mean + self.c * math.sqrt(2 * math.log(max(total, 1.0)) / self.counts[arm])

        return max(self.arms, key=bound)

    def reward(self, arm: str, fitness: float, reference: float) -> None:
        gain = math.expm1(min(max(fitness - reference, 0.0), 20.0))
        self.most = max(self.most, gain)
        for name in self.arms:
            self.sums[name] *= self.decay
            self.counts[name] *= self.decay
        if arm in self.sums:
            self.sums[arm] += gain
            self.counts[arm] += 1


class LossSearch:
    """`run()` evaluates the seeds, then one candidate per generation and island; `out/journal.jsonl` resumes it exactly.

    Everything that is drawn depends on (seed, number of the candidate) and on the candidates before it, so that a search
    that was stopped goes on as if it had not been. Raises BadInput for a journal of another search.
    """

    def __init__(
        self,
        fitness: Fitness,
        out: str | Path,
        seeds: Sequence[str] = ("E * sum(f * P)",),
        settings: Settings = Settings(),
        proposers: dict[str, Proposer] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        if not seeds:
            raise BadInput("seeds: a search starts from at least one expression")
        self.seeds = [str(parse(text)) for text in seeds]
        self.fitness, self.settings, self.proposers = fitness, settings, dict(proposers or {})
        self.out = Path(out)
        self.journal = self.out / "journal.jsonl"
        self.candidates: list[Candidate] = []
        self.rejected = 0
        self._behaviours: list[Any] = []
        said = {key: value for key, value in asdict(settings).items() if key != "generations"}
        self.about = {"settings": said, "seeds": self.seeds, "proposers": sorted(self.proposers), **(about or {})}
        self.bandit = Bandit(["grammar", *sorted(self.proposers)])
        self._open()

    @property
    def total(self) -> int:
        """Candidates of the whole search."""
        return len(self.seeds) * self.settings.islands + self.settings.generations * self.settings.islands

    @property
    def best(self) -> Candidate:
        return max(self.candidates, key=lambda c: c.fitness)

    def run(self, watch: Callable[[LossSearch], None] = lambda search: None) -> Candidate:
        """Go on to the last generation; `watch` is called after every candidate. Returns the best."""
        watch(self)
        while len(self.candidates) < self.total:
            candidate = self._next(len(self.candidates))
            self._add(candidate)
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(candidate) | {"also_on": []}) + "\n")
            watch(self)
        return self.best

    def archive(self, island: int) -> list[Candidate]:
        """The island's best, and those that migrated to it, best first."""
        own = [c for c in self.candidates if c.island == island or island in c.also_on]
        return sorted(own, key=lambda c: (-c.fitness, c.index))[: self.settings.archive]

    def _next(self, index: int) -> Candidate:
        islands, rng = self.settings.islands, random.Random(f"{self.settings.seed}:{index}")
        island = index % islands
        if index < len(self.seeds) * islands:
            text = self.seeds[index // islands]
            twin = next((c for c in self.candidates if c.text == text), None)
            result = dict(twin.result) if twin else self.fitness(text)
            return Candidate(index, text, island, None, "seed", "seed", result)
        archive = self.archive(island)
        parent = self._parent(archive, rng)
        proposer = self.bandit.pick(rng)
        tree, how = self._propose(parent, archive, proposer, rng)
        text = str(tree)
        return Candidate(index, text, island, parent.index, how, proposer, self.fitness(text))

    def _parent(self, archive: list[Candidate], rng: random.Random) -> Candidate:
        """From the elite of the archive, or from all of it, by fitness and by how few children it has."""
        if rng.random() < self.settings.exploit:
            archive = archive[: max(1, round(self.settings.elite * len(archive)))]
        children = [sum(c.parent == one.index for c in self.candidates) for one in archive]
        return rng.choices(archive, parent_weights([c.fitness for c in archive], children))[0]

    def _propose(self, parent: Candidate, archive: list[Candidate], proposer: str, rng: random.Random) -> tuple[Node, str]:
        """A novel tree, asked for up to `attempts` times; the grammar stands in for a proposer that has none."""
        others = [parse(c.text) for c in archive if c.index != parent.index]
        for _ in range(self.settings.attempts):
            if proposer in self.proposers:
                try:
                    tree, how = parse(self.proposers[proposer](parent.text, self.context(archive))), "proposed"
                except BadInput:
                    self.rejected += 1
                    continue
            else:
                tree, how = propose(parse(parent.text), others, rng)
            if novel(tree, self._behaviours):
                return tree, how
            self.rejected += 1
        for _ in range(20 * self.settings.attempts):
            tree, how = propose(parse(parent.text), others, rng)
            if novel(tree, self._behaviours):
                break
        return tree, how

    def context(self, archive: list[Candidate]) -> dict[str, Any]:
        """What a proposer is told: the best of the island, with their results."""
        return {"archive": [{"expression": c.text, **c.result} for c in archive[:5]], "tried": len(self.candidates)}

    def _add(self, candidate: Candidate) -> None:
        """Take in an evaluated candidate: the archive, what is known, the bandit, and migration when it is due."""
        known = candidate.how != "seed"
        if known:
            assert candidate.parent is not None
            baseline = max(c.fitness for c in self.candidates if c.how == "seed")
            self.bandit.reward(candidate.proposer, candidate.fitness, max(baseline, self.candidates[candidate.parent].fitness))
        self.candidates.append(candidate)
        self._behaviours.append(behaviour(parse(candidate.text)))
        settings, past = self.settings, len(self.candidates) - len(self.seeds) * self.settings.islands
        if settings.islands > 1 and past > 0 and past % (settings.migrate_every * settings.islands) == 0:
            self._migrate()

    def _migrate(self) -> None:
        """The best of every island are also the next island's."""
        leaving = [self.archive(island) for island in range(self.settings.islands)]
        for island, archive in enumerate(leaving):
            for c in archive[: math.ceil(self.settings.migrate * len(archive))]:
                target = (island + 1) % self.settings.islands
                if target != c.island and target not in c.also_on:
                    c.also_on.append(target)

    def _open(self) -> None:
        """Read the journal, or start one. A last line that was cut short is dropped."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self.journal.exists():
            self.journal.write_text(json.dumps({"search": self.about}) + "\n")
            return
        lines = self.journal.read_text(encoding="utf-8").split("\n")
        kept = lines[:-1]
        try:
            if json.loads(kept[0])["search"] != self.about:
                raise BadInput(f"{self.journal} is of a search with other settings; give another out")
            for line in kept[1 : self.total + 1]:
                self._add(Candidate(**json.loads(line)))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise BadInput(f"{self.journal}: broken at candidate {len(self.candidates)} ({error}); delete it") from error
        if lines[-1]:
            self.journal.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
