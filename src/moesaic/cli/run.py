"""`moesaic run [MODEL] [PROMPT]`: what a MoE says, and which experts said it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moesaic.cli import options
from moesaic.cli.common import Debug, Json, console, emit, progress_console, single
from moesaic.cli.loading import Opened, open_model, open_streamed, streaming
from moesaic.core.errors import BadInput, MoesaicError

DEFAULT_PROMPT = "It is a truth universally acknowledged, that"
"""From the bundled model's own kind of text, so that `moesaic run` alone shows it at its best."""
PAGE = "moesaic-run.html"


def run(
    model: options.Model = "bundled",
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; `-` reads standard input.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Chat; /reset forgets, /exit ends.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 160,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens that hold this much probability.")
    ] = 0.95,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repeats less likely.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    dtype: options.Dtype = "auto",
    experts: options.Experts = "moesaic",
    quantize: options.Quantize = None,
    memory: options.Memory = None,
    resident: options.Resident = None,
    policy: options.StreamPolicy = "lru",
    page_cache: options.PageCache = "direct",
    prefetch_bytes: options.PrefetchBytes = None,
    device: options.TierDevice = None,
    device_memory: options.DeviceMemory = None,
    device_policy: options.DevicePolicy = "lru",
    lossy: options.Lossy = None,
    steer: options.Steers = None,
    routing: options.RoutingJson = None,
    tune: options.Tune = False,
    data: Annotated[
        str | None, typer.Option(help="Text for --tune, and for --verify of a lossy mode; default: the prompt.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the resident model too and compare; of a lossy mode, measure the loss.")
    ] = False,
    threads: options.ChosenThreads = None,
    page: Annotated[Path, typer.Option(help="Where the HTML page goes.")] = Path(PAGE),
    no_page: Annotated[bool, typer.Option("--no-page", help="Write no page.")] = False,
    dense_ok: Annotated[bool, typer.Option(help="Run a model without experts anyway.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text, stream it, and show which experts did the work; a page with the details is written beside."""
    if threads is not None and threads < 1:
        raise BadInput(f"--threads {threads}: must be at least 1")
    streams = streaming(
        memory, resident, policy, page_cache, experts, {"--verify": verify, "--tune": tune, "--data": data is not None},
        lossy=lossy, prefetch_bytes=prefetch_bytes, device=device, device_memory=device_memory, device_policy=device_policy,
    )  # fmt: skip
    if data is not None and not (tune or (verify and lossy)):
        raise BadInput(f"--data {data} is what --tune replays and --verify of a lossy mode reads: give one of them with it")
    if tune and device is not None:
        raise BadInput(f"--tune chooses the policy of host memory: leave --device {device} out, then give it")
    if tune and policy != "lru":
        raise BadInput(f"--tune chooses the policy: leave --policy {policy} out")
    options.check_quantize(quantize, experts, streams)
    if verify and (steer or routing):
        raise BadInput("--verify compares with the model as it is: leave --steer and --routing out")
    text = None if interactive and prompt is None and prompt_file is None else _prompt(prompt, prompt_file)
    target = None if no_page else page
    if target is not None:
        from moesaic.core.files import check_writable

        check_writable(target)
    from moesaic.cli import run_session as session
    from moesaic.serving.generate import Sampling

    asked = options.steering_of(steer, routing)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    out = progress_console if json else console
    streamed = found = None
    if tune:
        from moesaic.cli.tune import tuned

        assert streams is not None
        if text is None and data is None:
            raise BadInput("--tune reads a text: give a prompt, or --data FILE")
        streams, found = tuned(model, dtype, streams, out, text, data, trust_remote_code)
    if streams is None:
        opened = open_model(
            model, dtype, experts=experts, dense_ok=dense_ok, trust_remote_code=trust_remote_code, quantize=quantize
        )
    else:
        opened, streamed = open_streamed(model, dtype, trust_remote_code=trust_remote_code, **streams)
    live = session.Session(model, opened, sampling, out, None if json else sys.stdout, threads, streamed)
    live.tuned = found
    if asked is not None:
        live.steer(asked, [*(steer or []), *([] if routing is None else [routing])])
    live.show_facts()
    if interactive:
        _chat(live, text)
    else:
        assert text is not None
        live.show_prompt(text)
        live.answer(live.encode(text))
    if live.turn is None:
        return
    live.show_table()
    if verify:
        live.verify(trust_remote_code, data)
    try:
        written = live.write_page(target, _command(model, live, seed)) if target is not None else None
    except MoesaicError as error:
        # The text is on the screen already; with --json it is lost unless it is printed now.
        if json:
            emit(live.result(None))
        raise BadInput(f"{error}; the text is complete: give another --page, or --no-page") from error
    if json:
        emit(live.result(written))
    if live.verified is not None and not all(live.verified.values()):
        raise typer.Exit(1)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise BadInput(f"give a prompt or --prompt-file {prompt_file}, not both")
    if prompt_file is not None:
        try:
            text = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise BadInput(f"--prompt-file {prompt_file}: {reason}") from error
    elif prompt == "-" or (prompt is None and _piped()):
        text = sys.stdin.read()
        if prompt is None and not text:
            text = DEFAULT_PROMPT
    else:
        text = DEFAULT_PROMPT if prompt is None else prompt
    if not text.strip():
        raise BadInput("the prompt is empty: give some text for the model to continue")
    return text


def _piped() -> bool:
    """Whether standard input holds a prompt: a file, or a pipe with something in it (an idle one must not block us)."""
    import os
    import select
    import stat

    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(mode):
            return True
        return stat.S_ISFIFO(mode) and bool(select.select([sys.stdin], [], [], 0.5)[0])
    except (OSError, ValueError, AttributeError):
        return False


def _chat(live: Any, first: str | None) -> None:
    """Read, answer, repeat. A message that cannot be answered is dropped, and the conversation goes on."""
    out: Console = live.out
    out.print("[dim]type a message; /reset forgets the conversation, /exit or Ctrl-D ends it[/dim]")
    waiting = first
    while True:
        if waiting is None:
            try:
                waiting = out.input("[bold]you>[/bold] ")
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
        message, waiting = waiting, None
        command = message.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            live.reset()
            out.print("[dim]forgotten[/dim]")
        elif command:
            try:
                live.chat(message)
            except MoesaicError as error:
                out.print(f"[yellow]{error}; /reset starts afresh[/yellow]")


def _command(model: str, live: Any, seed: int) -> str:
    import shlex

    return shlex.join(["moesaic", *sys.argv[1:]]) if sys.argv[1:2] == ["run"] else f"moesaic run {shlex.quote(model)}"


app = single(run)

__all__ = ["Opened", "app", "run"]
