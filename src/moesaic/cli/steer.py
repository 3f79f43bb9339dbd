"""`moesaic steer`: what steering methods need before a request can name them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from moesaic.cli.common import Debug, Json, console, emit
from moesaic.cli.options import ChosenThreads, Dtype, Model, TrustRemoteCode, use_threads
from moesaic.cli.steer_mogu import mogu
from moesaic.cli.steer_rows import QUESTION, is_question, json_rows, question_ids
from moesaic.cli.steer_sdm import sdm
from moesaic.cli.steer_sdm_network import sdm_network
from moesaic.core.errors import BadInput

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__)


app.command("sdm")(sdm)
app.command("sdm-network")(sdm_network)
app.command("mogu")(mogu)


@app.callback()
def steer() -> None:
    """What steering methods need before a request can name them."""


@app.command("find")
def find(
    model: Model,
    prompts_with: Annotated[
        Path | None, typer.Option(help="Prompts that show the behaviour: a line each, or JSON lines.")
    ] = None,
    prompts_without: Annotated[Path | None, typer.Option(help="Prompts that do not.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Or a trace, whose domains are the classes.")] = None,
    behaviour: Annotated[str, typer.Option(help="Name of the behaviour; with --trace, the domain that shows it.")] = "with",
    top: Annotated[int, typer.Option(help="Show so many experts; a request chooses its own number.")] = 10,
    by: Annotated[str, typer.Option(help="weights or counts.")] = "weights",
    per_token: Annotated[bool, typer.Option("--per-token", help="Divide by the prompt's length.")] = False,
    max_prompts: Annotated[int, typer.Option(help="Read at most so many prompts of each class.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Cut prompts here.")] = 512,
    out: Annotated[Path, typer.Option("--out", "-o", help="The map to write.")] = Path("behaviour.json"),
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the experts that a behaviour uses (MoTE): contrast two sets of prompts, and write the map that `--steer` takes.

    \b
    moesaic steer find bundled --prompts-with poems.txt --prompts-without plain.txt -o map.json
    moesaic run bundled "..." --steer mote:map=map.json,top=10
    """
    if by not in ("weights", "counts"):
        raise BadInput(f"--by {by!r}: weights or counts")
    if (trace is None) == (prompts_with is None) or (prompts_with is None) != (prompts_without is None):
        raise BadInput("give --prompts-with and --prompts-without, or --trace and --behaviour")
    if min(max_prompts, max_tokens, top) < 1:
        raise BadInput(f"--max-prompts {max_prompts}, --max-tokens {max_tokens}, --top {top}: at least 1")
    from moesaic.core.files import check_writable

    check_writable(out)
    from moesaic.steering import behaviour as maps

    if trace is not None:
        from moesaic.trace import open_trace

        opened = open_trace(trace)
        maps_SLE, domain_S = maps.maps_of_trace(opened, by, per_token)  # type: ignore[arg-type]
        classes = {d: maps_SLE[[i for i, own in enumerate(domain_S) if own == d]] for d in sorted(set(domain_S))}
        names = tuple(layer.name for layer in opened.layers)
    else:
        from moesaic.cli.loading import open_model
        from moesaic.view import view

        assert prompts_with is not None
        assert prompts_without is not None
        texts = {behaviour: prompts(prompts_with, max_prompts), "without": prompts(prompts_without, max_prompts)}
        if len(texts) < 2:
            raise BadInput(f"--behaviour {behaviour!r} is the name of the other class: choose another")
        use_threads(threads)
        live = open_model(model, dtype, trust_remote_code=trust_remote_code)
        blocks = view(live.model)
        names = tuple(block.name for block in blocks)
        classes = {
            name: maps.activation_maps(
                live.model, blocks, [live.tokenizer(text)["input_ids"][:max_tokens] for text in given], by, per_token  # type: ignore[arg-type]
            )
            for name, given in texts.items()
        }  # fmt: skip
    difference_LE = maps.difference(classes, behaviour)
    found = maps.BehaviourMap(
        model, behaviour, {name: len(given) for name, given in classes.items()}, by, per_token, names,
        tuple(tuple(row) for row in difference_LE.tolist()),
    )  # fmt: skip
    rows = found.rows(min(top, difference_LE.numel()))
    written = found.write(out)
    result = {
        "map": str(written),
        "behaviour": behaviour,
        "prompts": found.prompts,
        "by": by,
        "per_token": per_token,
        "top": rows,
    }
    if json:
        emit(result)
        return
    _show(result)


@app.command("references")
def references(
    model: Model,
    data: Annotated[Path, typer.Option(help="JSON lines of {prompt, answer}, and choices where there are some.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The store to write.")] = Path("references.safetensors"),
    max_prompts: Annotated[int, typer.Option(help="Read at most so many.")] = 1000,
    max_tokens: Annotated[int, typer.Option(help="Leave out prompts that are longer.")] = 1024,
    dtype: Dtype = "auto",
    threads: ChosenThreads = 1,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Build the reference store of C3PO: the prompts that the model answers rightly, with their pathways.

    \b
    moesaic steer references bundled --data questions.jsonl -o refs.safetensors
    moesaic run bundled "..." --steer c3po:store=refs.safetensors,how=regression
    """
    from moesaic.cli.loading import open_model
    from moesaic.core.files import check_writable
    from moesaic.steering.references import collect
    from moesaic.view import view

    check_writable(out)
    given = json_rows(data, "--data", max_prompts, {QUESTION: is_question})
    use_threads(threads)
    live = open_model(model, dtype, trust_remote_code=trust_remote_code)

    rows = [question_ids(live.tokenizer, row) for row in given]
    rows = [row for row in rows if 0 < len(row[0]) <= max_tokens and row[1] and all(row[2])]
    made = collect(live.model, view(live.model), rows, model)
    written = made.write(out)
    result = {"store": str(written), "read": len(rows), "right": len(made), "layers": len(made.blocks)}
    if json:
        emit(result)
    else:
        console.print(f"{len(made)} of {len(rows)} answered rightly; store: {written}", highlight=False)


def prompts(path: Path, most: int) -> list[str]:
    """The lines of a text file, or the texts of JSON lines. Raises BadInput where there is none."""
    from moesaic.core.documents import read_documents

    texts = [document.text for document in read_documents(path)]
    if not any(path.name.removesuffix(".gz").endswith(end) for end in (".jsonl", ".json")):
        texts = [line for text in texts for line in text.splitlines()]
    texts = [text for text in texts if text.strip()][:most]
    if not texts:
        raise BadInput(f"{path}: no prompts in it")
    return texts


def _show(result: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("block")
    table.add_column("expert", justify="right")
    table.add_column("score", justify="right")
    for row in result["top"]:
        table.add_row(row["block"], str(row["expert"]), f"{row['score']:+.4f}")
    console.print(table)
    console.print(f"map: {result['map']}; use it: --steer mote:map={result['map']},top={len(result['top'])}", highlight=False)
