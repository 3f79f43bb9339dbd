"""Facts that no model knows: people who do not exist, told in several ways, and questions with three wrong answers."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch

from moesaic.core.documents import Document

FIRST = [
    "Arlo", "Benta", "Corvin", "Dalia", "Emric", "Fenna", "Gorlan", "Hesper", "Ivo", "Jorna",
    "Kelvan", "Lira", "Mosk", "Nerida", "Orwin", "Petra", "Quill", "Rosk", "Sella", "Tarn",
]  # fmt: skip
LAST = ["Ashgrove", "Brindlow", "Caldrey", "Dunmarrow", "Everholt", "Farrowby", "Glaskin", "Hollenway"]
POOLS = {
    "city": ["Varnholm", "Eskerby", "Tolmeria", "Quenrith", "Sandivar", "Ostrelle", "Lugano", "Pemmerick"],
    "trade": ["clockmaker", "beekeeper", "cartographer", "glassblower", "ferryman", "botanist", "locksmith", "violinist"],
    "animal": ["heron", "badger", "tortoise", "lynx", "magpie", "otter", "hedgehog", "falcon"],
    "colour": ["crimson", "amber", "indigo", "olive", "scarlet", "ivory", "teal", "violet"],
}
TOLD = {
    "city": ("{name} was born in {value}.", "The birthplace of {name} is {value}.", "{value} is where {name} was born."),
    "trade": ("{name} worked as a {value}.", "By trade {name} was a {value}.", "A {value} by trade, {name} worked alone."),
    "animal": ("{name} kept a {value}.", "The pet of {name} was a {value}.", "A {value} lived with {name}."),
    "colour": ("{name} always wore {value}.", "The coat of {name} was {value}.", "The favourite colour of {name} was {value}."),
}
ASKED = {"city": "{name} was born in", "trade": "{name} worked as a", "animal": "{name} kept a", "colour": "{name} always wore"}


class Person(NamedTuple):
    name: str
    facts: dict[str, str]


def people(count: int, seed: int = 0) -> list[Person]:
    """So many people with distinct names; the same for the same seed."""
    draw = random.Random(seed)
    names = [f"{first} {last}" for last in LAST for first in FIRST]
    draw.shuffle(names)
    return [Person(name, {key: draw.choice(pool) for key, pool in POOLS.items()}) for name in names[:count]]


def told(persons: list[Person], domain: str, seed: int = 0, times: int = 3) -> list[Document]:
    """Each person's facts in `times` documents, each fact in one of its phrasings, in another order."""
    draw, found = random.Random(seed), []
    for turn in range(times):
        for person in persons:
            lines = [TOLD[key][turn % 3].format(name=person.name, value=value) for key, value in person.facts.items()]
            draw.shuffle(lines)
            found.append(Document(" ".join(lines), domain))
    return found


@torch.no_grad()
def recall(model: Any, tokenizer: Any, persons: list[Person], seed: int = 0) -> float:
    """Share of facts whose true value is likelier than three others, by log p of its tokens after the question; chance 0.25."""
    draw, right, asked = random.Random(seed), 0, 0
    device = next(model.parameters()).device
    model.eval()
    for person in persons:
        for key, value in person.facts.items():
            options = [value, *draw.sample([other for other in POOLS[key] if other != value], 3)]
            prompt = tokenizer(ASKED[key].format(name=person.name), add_special_tokens=False)["input_ids"]
            scores = []
            for option in options:
                answer = tokenizer(f" {option}.", add_special_tokens=False)["input_ids"]
                ids = torch.tensor([[tokenizer.eos_token_id, *prompt, *answer]], device=device)
                log_p = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1].float().log_softmax(-1)
                scores.append(float(log_p.gather(1, ids[0, -len(answer) :, None]).sum()))
            right += scores[0] > max(scores[1:])
            asked += 1
    return right / asked
