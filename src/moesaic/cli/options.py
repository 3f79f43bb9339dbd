"""Options that several commands share, so that they are called and explained alike."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesaic.core.errors import BadInput

Model = Annotated[str, typer.Argument(help="A local folder, a hub id, or `bundled`.")]
Data = Annotated[str, typer.Option(help="Text, or JSON lines of {text, domain}, plain or gzip: a file or a folder.")]
MaxBytes = Annotated[int | None, typer.Option(help="Use at most this many bytes of each domain.")]
Context = Annotated[int | None, typer.Option(help="Tokens per piece of text; default: the model's, at most 2048.")]
BatchSize = Annotated[int | None, typer.Option(help="Pieces per forward pass.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Experts = Annotated[str, typer.Option(help="Who computes the experts: moesaic, grouped_mm, batched_mm or eager.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
ChosenThreads = Annotated[int | None, typer.Option(help="CPU threads; default: one for a small model, else one per core.")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Let a hub model run its own code.")]

Memory = Annotated[str | None, typer.Option(help="Leave experts on disk; so much memory may hold some of them, such as 6GiB.")]
Resident = Annotated[float | None, typer.Option(help="The same as a share of all experts' bytes, such as 0.4.")]
StreamPolicy = Annotated[
    str, typer.Option(help="Which experts stay in memory: a policy of `moesaic replay`, or name:option=value.")
]
PageCache = Annotated[
    str, typer.Option(help="direct: read past the kernel's page cache; keep: fill it; drop: read through, then empty it.")
]

TierDevice = Annotated[
    str | None, typer.Option("--device", help="A GPU above them, such as cuda; stand-in: plain memory in its place.")
]
DeviceMemory = Annotated[str | None, typer.Option(help="Bytes of experts on --device, such as 8GiB; all else adds.")]
DevicePolicy = Annotated[str, typer.Option(help="Which experts --device keeps, and whether the host computes the others.")]

Quantize = Annotated[
    str | None, typer.Option(help="Round while loading: int8, int4, int2, int4:group=32; the linear layers too: int4:linear=4.")
]

Steers = Annotated[
    list[str] | None,
    typer.Option(
        metavar="<str>", help="A steering method, such as scmoe:beta=0.5 or mote:map=FILE,top=10; may be repeated; not exact."
    ),
]
RoutingJson = Annotated[
    str | None, typer.Option("--routing", help='JSON as in a request to `serve`: {"k": 1, "threshold": 0.1, "steer": {...}}.')
]

PrefetchBytes = Annotated[
    str | None, typer.Option(help="What a policy that guesses may read ahead in one pass; default: one token's experts.")
]
Lossy = Annotated[
    str | None,
    typer.Option(help="Read less by changing the output: skip:threshold=0.1, substitute:first=2+among=12, defer:experts=2."),
]
Tune = Annotated[
    bool, typer.Option("--tune", help="First replay this text over every policy that can run, then run with the best.")
]


def check_text(data: str, max_bytes: int | None, batch_size: int | None, threads: int | None, optional: bool = False) -> None:
    """Raises BadInput where a command that reads a text got none, unless it is optional, or a count below 1."""
    for option, value in (("--max-bytes", max_bytes), ("--batch-size", batch_size), ("--threads", threads)):
        if value is not None and value < 1:
            raise BadInput(f"{option} {value}: must be at least 1")
    if not data and not optional:
        raise BadInput("--data is missing: name a text file, a file of {text, domain} JSON lines, or a folder of them")


def check_quantize(quantize: str | None, experts: str, streams: dict[str, Any] | None) -> None:
    """Raises BadInput where rounding while loading does not go with the rest."""
    if quantize is not None and streams is not None:
        raise BadInput(f"--quantize {quantize} needs all experts in memory: stream a copy that `moesaic pack --bits` wrote")
    if quantize is not None and experts != "moesaic":
        raise BadInput(f"--quantize {quantize} runs on moesaic's kernels: leave --experts {experts} out")


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves its own choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def pairs(option: str, text: str) -> dict[str, Any]:
    """`k=3,nulls=8` as a mapping; values are YAML scalars. Raises BadInput naming the option."""
    import yaml

    found = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise BadInput(f"{option} {part!r}: write name=value, separated by commas")
        found[key.strip()] = yaml.safe_load(value)
    return found


def steering_of(steers: list[str] | None, routing: str | None) -> Any:
    """What --steer and --routing ask for, or None. Raises BadInput naming the option and what is wrong in it."""
    if not steers and routing is None:
        return None
    import json

    from moesaic.steering.spec import steering

    given: list[Any] = list(steers or [])
    if routing is not None:
        try:
            fields = json.loads(routing)
        except json.JSONDecodeError as error:
            raise BadInput(f"--routing {routing!r}: no JSON ({error.msg} at character {error.pos})") from error
        if not isinstance(fields, dict):
            raise BadInput(f'--routing {routing!r}: give an object, such as {{"k": 1}}')
        given.append(fields)
    return steering(given)
