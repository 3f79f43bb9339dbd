"""`moesaic upcycle MODEL... OUT --method NAME`: dense models become a MoE, or a MoE a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Context, MaxBytes, Threads, TrustRemoteCode, pairs
from moesaic.cli.surgical import Domain, Options, Plan, Resume, Statistics, run
from moesaic.core.errors import BadInput


def upcycle(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids, and last OUT: not there yet, or empty.")],
    method: Annotated[str, typer.Option(help="A method; `moesaic systems --family upcycle` lists them.")] = "sparse",
    experts: Annotated[int | None, typer.Option(help="Experts of a layer.")] = None,
    k: Annotated[int | None, typer.Option(help="Experts that a token runs.")] = None,
    every: Annotated[int | None, typer.Option(help="Experts in every so-manieth layer.")] = None,
    router: Annotated[str | None, typer.Option(help="Where router rows start: random, prompts or embedding.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A YAML list with an entry of texts per expert, for those two.")] = None,
    options: Options = "",
    data: Annotated[str | None, typer.Option("--data", help="Text that the method reads: a file or a folder.")] = None,
    statistics: Statistics = None,
    domain: Domain = None,
    max_bytes: MaxBytes = None,
    context: Context = None,
    plan: Plan = False,
    resume: Resume = False,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make a MoE of dense models; stock where an architecture fits, and then by streaming, whatever their size.

    \b
    moesaic upcycle DENSE OUT --method sparse --experts 8 --k 2 --plan
    moesaic upcycle SEED CODE LAW MATHS OUT --method btx --k 2
    moesaic upcycle MOE OUT --method dense --options how=concat --data TEXT
    """
    from moesaic.surgery.recipe import Step

    given: dict[str, Any] = pairs("--options", options)
    named = {"experts": experts, "k": k, "every": every, "router": router, "prompts": None if prompts is None else str(prompts)}
    given |= {name: value for name, value in named.items() if value is not None}
    sources, out = split(models, plan)
    step = Step(
        "upcycle", method, given, data=data, statistics=statistics, domain=domain, max_bytes=max_bytes, context=context,
        models=tuple(sources[1:]),
    )  # fmt: skip
    run([step], sources[0], out, plan, resume, json, threads, trust_remote_code)


def split(models: list[str], plan: bool) -> tuple[list[str], Path | None]:
    """The models, and OUT: the last word, which a plan may leave out."""
    last = Path(models[-1])
    if plan and (models[-1] == "bundled" or (last / "config.json").is_file()):
        return models, None
    if len(models) < 2:
        raise BadInput(f"{models[-1]} is OUT: name the model, or models, before it")
    return models[:-1], last


app = single(upcycle)
