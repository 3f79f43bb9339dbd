"""Fill the measured blocks of the model card and the data card, so that no number in them is typed by hand.

    python -m moesaic.evaluation.cards model docs/model-card.md --run runs/bundled --eval docs/results/bundled.json \\
        --twin-run runs/dense-twin --twin docs/results/dense-twin.json
    python -m moesaic.evaluation.cards data docs/data-card.md --train DATA/train --valid DATA/valid

A block lies between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; everything else in a card is prose and stays.
The --eval files are what `moesaic eval MODEL --data ... --compare-compressors --json` printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from moesaic.core.documents import read_documents
from moesaic.core.errors import BadInput, MoesaicError


def fill(card: str, name: str, block: str) -> str:
    """The card with that block replaced. Raises BadInput for a card without the block's two markers."""
    pattern = re.compile(rf"(<!-- {re.escape(name)}:begin -->\n).*?(<!-- {re.escape(name)}:end -->)", re.S)
    if not pattern.search(card):
        raise BadInput(f"the card has no block <!-- {name}:begin --> ... <!-- {name}:end -->")
    return pattern.sub(lambda m: m[1] + block.rstrip() + "\n" + m[2], card)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def results_block(ours: dict[str, Any], twin: dict[str, Any] | None) -> str:
    """Bits per byte by domain beside xz, zstd and the dense twin, and one sentence that counts who wins where."""
    head = ["domain", "moesaic", *(["dense twin"] if twin else []), "xz -9", "zstd -19", "perplexity", "bytes"]

    def row(name: str, mine: dict[str, Any], other: dict[str, Any] | None, bold: str = "") -> list[str]:
        cells = [_bits(mine.get("bits_per_byte")), *([_bits((other or {}).get("bits_per_byte"))] if twin else [])]
        cells += [_bits(mine.get("xz_bits_per_byte")), _bits(mine.get("zstd_bits_per_byte"))]
        cells += [_number(mine.get("perplexity")), f"{mine['bytes']:,}"]
        return [name, f"**{cells[0]}**", *cells[1:]] if not bold else [f"**{name}**", *(f"**{cell}**" for cell in cells)]

    others = twin["domains"] if twin else {}
    rows = [row(name, mine, others.get(name)) for name, mine in ours["domains"].items()]
    rows.append(row("all", ours, twin, bold="yes"))
    return table(head, rows) + "\n\n" + _verdict(ours, twin)


def _verdict(ours: dict[str, Any], twin: dict[str, Any] | None) -> str:
    domains = ours["domains"]
    said = []
    for key, name in (("xz", "xz -9"), ("zstd", "zstd -19")):
        known = {d: r for d, r in domains.items() if r.get(f"{key}_bits_per_byte") is not None}
        if known:
            won = [d for d, r in known.items() if r["bits_per_byte"] < r[f"{key}_bits_per_byte"]]
            lost = sorted(known.keys() - set(won))
            said.append(f"fewer bits than {name} in {len(won)} of {len(known)} domains{_except(lost)}")
    if twin:
        shared = {d for d in domains if d in twin["domains"]}
        lost = sorted(d for d in shared if domains[d]["bits_per_byte"] >= twin["domains"][d]["bits_per_byte"])
        gap = ours["mean_bits_per_byte"] / twin["mean_bits_per_byte"] - 1
        said.append(
            f"fewer than the dense twin in {len(shared) - len(lost)} of {len(shared)}{_except(lost)}, "
            f"{abs(gap):.1%} {'fewer' if gap < 0 else 'more'} on the mean over domains"
        )
    sizes = f"Context {ours.get('context')}, stride {ours.get('stride')}, {ours.get('dtype')}."
    return f"Bits per byte (lower is better): {'; '.join(said)}. {sizes}"


def _except(lost: list[str]) -> str:
    return f" (not in {', '.join(lost)})" if lost else ""


def facts_block(run: Path, twin: Path | None) -> str:
    """What a run folder knows about itself: recipe, size, tokens, time, losses."""
    rows = []
    columns = [("moesaic", _facts(run)), *([("dense twin", _facts(twin))] if twin else [])]
    for name in columns[0][1]:
        rows.append([name, *(facts[name] for _, facts in columns)])
    return table(["", *(name for name, _ in columns)], rows)


def _facts(run: Path) -> dict[str, str]:
    config = _read_json(run / "config.json")
    records = []
    for line in _read(run / "log.jsonl").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not records:
        raise BadInput(f"{run / 'log.jsonl'} holds no records")
    last = records[-1]
    valid = [(r["step"] + 1, r["valid_loss"]) for r in records if r.get("valid_loss") is not None]
    per_step = config["batch_size"] * config.get("accumulate", 1) * config["seq_len"]
    steps = last["step"] + 1
    total, active = _parameters(run, config["model"])
    return {
        "architecture": str(config["model"]["model_type"]),
        "parameters (active per token)": f"{total / 1e6:,.2f} M ({active / 1e6:,.2f} M)" if total else "-",
        "steps": f"{steps:,} of {config['steps']:,}",
        "tokens seen": f"{steps * per_step:,}",
        "tokens per step": f"{per_step:,}",
        "learning rate": f"{config['lr']:g}, {config['schedule']}, {config['warmup']} warm-up steps",
        "balance losses": ", ".join(f"{k} {v}" for k, v in config.get("balance", {}).items()) or "none",
        "precision": str(config["dtype"]),
        "seed": str(config["seed"]),
        "training time": f"{last['seconds'] / 3600:,.2f} h",
        "training loss, last record (nats per token)": f"{last['loss']:.3f}",
        "validation loss by step (nats per token)": ", ".join(f"{s:,}: {v:.3f}" for s, v in valid[-4:]) or "-",
        "busiest expert's load over the mean, by layer": " ".join(f"{1 + v:.2f}" for v in last.get("max_vio", [])) or "-",
    }


def _parameters(run: Path, model: dict[str, Any]) -> tuple[int, int]:
    """Stored and active parameters, from the headers of the final checkpoint; (0, 0) before there is one."""
    from safetensors import safe_open

    total = active = 0.0
    for file in sorted((run / "final").glob("*.safetensors")):
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118
                count = 1
                for size in handle.get_slice(name).get_shape():
                    count *= size
                total += count
                chosen = model.get("num_experts_per_tok", 1) / model.get("num_experts", 1) if ".experts." in name else 1
                active += count * chosen
    return int(total), int(active)


def data_block(train: str | Path, valid: str | Path | None) -> str:
    """Documents and bytes of each domain, in both parts."""
    parts = [_sizes(train), *([_sizes(valid)] if valid else [])]
    head = ["domain", "train documents", "train bytes", *(["valid documents", "valid bytes"] if valid else [])]
    names = sorted(set().union(*parts))
    rows = [[name, *(f"{value:,}" for part in parts for value in part.get(name, (0, 0)))] for name in names]
    sums = [f"**{sum(part[name][i] for name in part):,}**" for part in parts for i in (0, 1)]
    return table(head, [*rows, ["**all**", *sums]])


def _sizes(path: str | Path) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for document in read_documents(path):
        count, size = found.get(document.domain, (0, 0))
        found[document.domain] = count + 1, size + len(document.text.encode())
    return found


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON ({error.msg})") from error
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moesaic.evaluation.cards", description="Fill the measured blocks of a card."
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    model = kinds.add_parser("model")
    model.add_argument("card", type=Path)
    model.add_argument("--run", type=Path, help="run folder of the model: fills the block `facts`")
    model.add_argument("--twin-run", type=Path)
    model.add_argument("--eval", type=Path, help="its eval JSON: fills the block `results`")
    model.add_argument("--twin", type=Path, help="the dense twin's eval JSON")
    data = kinds.add_parser("data")
    data.add_argument("card", type=Path)
    data.add_argument("--train", required=True)
    data.add_argument("--valid")
    given = parser.parse_args(argv)
    try:
        card = _read(given.card)
        if given.kind == "data":
            card = fill(card, "sizes", data_block(given.train, given.valid))
        else:
            if given.run:
                card = fill(card, "facts", facts_block(given.run, given.twin_run))
            if given.eval:
                card = fill(
                    card, "results", results_block(_read_json(given.eval), _read_json(given.twin) if given.twin else None)
                )
        given.card.write_text(card, encoding="utf-8")
    except MoesaicError as error:
        print(f"cards: {error}", file=sys.stderr)
        return 2
    print(given.card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
