"""docs/laboratory.md: what the comparison measured, and which claims of papers show in it, in words made from numbers."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml

from moesaic.laboratory.summary import CERTAIN, difference, noise

REFERENCE = "topk"
HEADS = ("cell", "bits per byte", "against the reference", "MaxVio", "load CV", "changed", "FLOPs per token", "parameters",
         "tokens/s", "memory MB", "seeds")  # fmt: skip
GROUPS = {
    "reference": "The reference and its dense twins",
    "routers": "Routers",
    "banks": "Banks",
    "layers": "Layers",
    "balance": "Balance and schedules",
    "masked": "Methods that see later tokens: masked language models",
}
WORDS = {-1: "better", 0: "cannot be told", 1: "worse"}
EQUAL = 1.05
"""FLOPs per token count as equal up to this ratio."""
NAMES = {"bits_per_byte": "bits per byte", "max_vio": "MaxVio", "load_cv": "load CV", "changed": "changed sets"}


def claims() -> list[dict[str, Any]]:
    """The claims of claims.yaml."""
    return yaml.safe_load(resources.files("moesaic.laboratory").joinpath("claims.yaml").read_text(encoding="utf-8"))


def verdicts(table: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Each claim as a line under `shows`, `unequal`, `contrary`, `untold` or `missing`; see `difference`.

    `unequal`: it shows, but the cell spends more FLOPs than what it is held against, which the claim does not say.
    """
    found: dict[str, list[str]] = {"shows": [], "unequal": [], "contrary": [], "untold": [], "missing": []}
    by_name = {row["name"]: row for row in table}
    for claim in claims():
        measure = claim["measure"]
        gap = difference(table, claim["cell"], claim["than"], measure)
        pair = f"`{claim['cell']}` against `{claim['than']}`"
        if gap is None:
            found["missing"].append(f"{claim['says']}: {pair}")
            continue
        error = "no spread known" if gap["error"] is None else f"± {CERTAIN * gap['error']:.3f}"
        line = f"{claim['says']}: {pair}, {NAMES[measure]} {gap['gap']:+.3f} ({error})"
        ratio = _flops_ratio(by_name[claim["cell"]], by_name[claim["than"]])
        if gap["sign"] < 0 and ratio > EQUAL and not claim.get("at_more_flops"):
            found["unequal"].append(f"{line}, at {ratio:.2f} times the FLOPs")
        else:
            found[{-1: "shows", 1: "contrary", 0: "untold"}[gap["sign"]]].append(line)
    return found


def _flops_ratio(row: dict[str, Any], other: dict[str, Any]) -> float:
    return row["flops_per_token"] / other["flops_per_token"]


def document(summary: dict[str, Any], machine: str, picture: str, page: str) -> str:
    """The Markdown file, from a summary as `moesaic lab` writes it."""
    table = summary["rows"]
    found = verdicts(table)
    parts = [_opening(summary, machine, picture, page), _setting(summary), _claims(found)]
    for group, title in GROUPS.items():
        rows = [row for row in table if row["group"] == group]
        if rows:
            reference = "masked-topk" if group == "masked" else REFERENCE
            parts.append(f"## {title}\n\n{_table(rows, table, reference)}")
    parts += [_left_out(summary), _how()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(summary: dict[str, Any], machine: str, picture: str, page: str) -> str:
    done = sum(cell["status"] == "done" for cell in summary["cells"])
    missing = summary["missing"]
    lines = [
        "# The laboratory",
        "Every registered router, bank and layer that runs in a language model, trained side by side: the same text, the same "
        f"tokens, the same active FLOPs. {done} trainings on {machine}. This page is written by `moesaic lab --report` from "
        "[the results](../benchmarks/results/lab.json); "
        f"[all curves and a table to sort]({page}).",
        f"![Training curves of the reference, its dense twins and some routers]({picture})",
    ]
    if missing:
        lines.append(f"**Not complete**: {len(missing)} trainings are missing: {', '.join(f'`{name}`' for name in missing)}. "
                     "`moesaic lab` goes on where it stopped.")  # fmt: skip
    return "\n\n".join(lines)


def _setting(summary: dict[str, Any]) -> str:
    base, model = summary["base"], summary["base"]["model"]
    tokens = base["steps"] * base["batch_size"] * base["seq_len"]
    sd = noise(summary["rows"], "bits_per_byte")
    spread = "not known yet" if sd is None else f"{sd:.4f}"
    size = f"{model['num_hidden_layers']} layers, {model['num_attention_heads']} heads, context {base['seq_len']}"
    experts = f"{model['experts']} experts of width {model['expert_width']} of which {model['k']} run"
    work = f"{base['steps']} steps of {base['batch_size'] * base['seq_len']:,} tokens ({tokens:,} in all)"
    return f"""## What was done

Width {model["hidden_size"]}, {size}, {experts}, a {base["vocab_size"]}-token BPE; {work}, AdamW at {base["lr"]:g},
{base["schedule"]}, float32, one thread. Where a method changes the cost of a token, its expert width was fitted until the FLOPs
are those of `{REFERENCE}` again (the width beside its name); what could not be fitted shows in its column. This is a very small
model trained very briefly: the loss leaves its first plateau around the middle of the run, and a method that leaves it later
looks far worse here than it may end. **Nothing on this page says how a method does at the scale of its paper.**

- *bits per byte*: of held-out text, all domains, total bits over total bytes. Masked models: of the hidden tokens, comparable
  among themselves only.
- *against the reference*: the difference, and "cannot be told" within {CERTAIN:g} standard errors. The seed-to-seed standard
  deviation, pooled over the cells with several seeds: {spread} bits per byte. Cells with one seed are judged by it as well, and
  a method whose runs differ more than that from seed to seed is judged too strictly or too kindly.
- *MaxVio*, *load CV*: the busiest expert over the mean, minus one; standard deviation over mean; of held-out rows, mean over
  layers, true experts only.
- *changed*: share of tokens whose set of experts differs between 90 % and 100 % of the steps, mean over layers.
- *FLOPs per token*: matrix products of a forward in evaluation as counted while they run, head and attention included.
- *tokens/s*: of training, per second of processor time (the machine was shared). *memory*: what the process grew by."""


def _claims(found: dict[str, list[str]]) -> str:
    titles = {
        "shows": "Shows at this scale",
        "unequal": "Shows, but at more FLOPs: no evidence for the method",
        "contrary": "Does not show: the difference goes the other way",
        "untold": "Cannot be told: inside the spread of seeds",
        "missing": "Not measured yet",
    }
    parts = ["## What papers claim", f"A minus means less; the bracket holds {CERTAIN:g} standard errors."]
    for key, title in titles.items():
        if found[key]:
            parts.append(f"**{title}**\n\n" + "\n".join(f"- {line}" for line in found[key]))
    return "\n\n".join(parts)


def _table(rows: list[dict[str, Any]], table: list[dict[str, Any]], reference: str) -> str:
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    by_name = {row["name"]: row for row in table}
    for row in sorted(rows, key=lambda row: (row["bits_per_byte"] is None, row["bits_per_byte"])):
        if not row["seeds"]:
            lines.append(f"| `{row['name']}` | failed: {'; '.join(row['errors'])} |" + " |" * (len(HEADS) - 2))
            continue
        gap = difference(table, row["name"], reference)
        told = "" if gap is None or row["name"] == reference else f"{gap['gap']:+.3f}, {WORDS[gap['sign']]}"
        ratio = 1.0 if gap is None else _flops_ratio(row, by_name[reference])
        if not 1 / EQUAL <= ratio <= EQUAL:
            told += f" (at {ratio:.2f} times the FLOPs)"
        width = "" if row["fitted"] is None else f" (width {row['fitted']})"
        sd = row["sd"].get("bits_per_byte")
        score = _number(row["bits_per_byte"], 3) + ("" if sd is None else f" ± {sd:.3f}")
        cells = [
            f"`{row['name']}`{width}", score, told, _number(row["max_vio"], 2), _number(row["load_cv"], 2),
            "" if row["changed"] is None else f"{100 * row['changed']:.0f} %", f"{row['flops_per_token'] / 1000:,.0f} k",
            f"{row['parameters'] / 1000:,.0f} k", f"{row['tokens_per_cpu_second'] or 0:,.0f}", _number(row["memory_mb"], 0),
            str(row["seeds"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _left_out(summary: dict[str, Any]) -> str:
    lines = [f"- `{name}` {why}" for name, why in summary["left_out"].items()]
    return "## Without a cell of their own\n\n" + "\n".join(lines) if lines else ""


def _how() -> str:
    return """## Again

```sh
moesaic lab                      # trains what is missing (runs/lab), then the closest cells with more seeds
moesaic lab --budget 50m         # for so long; the next call goes on
moesaic lab --report             # writes the results, this page and its curves from what there is
```

The cells are in `src/moesaic/laboratory/lab.yaml`, the claims in `claims.yaml` beside it."""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
