"""`moesaic surgery RECIPE.yaml MODEL OUT`: several steps of surgery, planned whole, run one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.common import Debug, Json, single
from moesaic.cli.options import Model, Threads, TrustRemoteCode
from moesaic.cli.surgical import Out, Plan, Resume, run
from moesaic.core.errors import BadInput


def surgery(
    recipe: Annotated[Path, typer.Argument(help="A YAML file of steps; docs/surgery.md shows one.")],
    model: Model,
    out: Out = None,
    plan: Plan = False,
    resume: Resume = False,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune, merge, compress, quantise, unlearn and edit in one recipe.

    \b
    moesaic surgery recipe.yaml bundled OUT --plan
    moesaic surgery recipe.yaml bundled OUT
    """
    import yaml

    from moesaic.surgery.recipe import parse

    try:
        given = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{recipe}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{recipe} is not YAML ({' '.join(str(error).split())})") from error
    steps = parse(given, str(recipe), recipe.parent)
    run(steps, model, out, plan, resume, json, threads, trust_remote_code)


app = single(surgery)
