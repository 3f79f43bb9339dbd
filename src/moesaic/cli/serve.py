"""`moesaic serve MODEL`: an OpenAI-compatible server over one model, with a live page."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import options
from moesaic.cli.common import Debug, Json, emit, progress_console, single
from moesaic.cli.loading import open_model, open_streamed, streaming
from moesaic.core.errors import BadInput


def serve(
    model: options.Model = "bundled",
    models: Annotated[
        str | None,
        typer.Option(help="Several models instead, FOLDER,FOLDER or NAME=FOLDER,...: --memory holds those that are asked for."),
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="With --models: a name that never leaves memory; may be repeated.")
    ] = None,
    max_wait: Annotated[
        float, typer.Option(help="With --models: seconds after which a request goes before those for models in memory.")
    ] = 10.0,
    name: Annotated[
        list[str] | None, typer.Option(help="Name that requests use; may be repeated. Default: the last part of MODEL.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(help="Key that requests must carry; may be repeated.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key per line: keeps keys off the command line.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Answers written at the same time.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more are refused with 429.")] = 64,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer; default: the model's own limit.")
    ] = None,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 600.0,
    write_timeout: Annotated[float, typer.Option(help="Seconds after which a reader that takes nothing is dropped.")] = 60.0,
    grace: Annotated[float, typer.Option(help="Seconds that running requests have after SIGINT or SIGTERM.")] = 30.0,
    alone: Annotated[
        bool, typer.Option("--alone", help="No shared steps: slower, and bitwise `generate` in every dtype.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (as stored; float32 on a CPU with room), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: where the weights load.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Bytes of experts on --device, such as 8GiB; the others stay in host memory, or on disk.")
    ] = None,
    device_policy: options.DevicePolicy = "lru",
    experts: options.Experts = "moesaic",
    quantize: options.Quantize = None,
    memory: options.Memory = None,
    resident: options.Resident = None,
    policy: options.StreamPolicy = "lru",
    page_cache: options.PageCache = "direct",
    prefetch_bytes: options.PrefetchBytes = None,
    lossy: options.Lossy = None,
    steer_file: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a file that requests may name in routing.steer; may be repeated.")
    ] = None,
    tune: options.Tune = False,
    data: Annotated[str | None, typer.Option(help="The text that --tune replays.")] = None,
    threads: options.ChosenThreads = None,
    dense_ok: Annotated[bool, typer.Option(help="Serve a model without experts anyway.")] = False,
    trust_remote_code: options.TrustRemoteCode = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line per request on standard error.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve a model: chat, completions, embeddings, metrics and a live page. Ctrl-C ends it cleanly."""
    _check(max_rows=max_rows, max_waiting=max_waiting, max_body=max_body, timeout=timeout, write_timeout=write_timeout)
    if max_context is not None and max_context < 2:
        raise BadInput(f"--max-context {max_context}: must be at least 2 (a token of prompt, a token of answer)")
    if not 0 <= grace < float("inf"):
        raise BadInput(f"--grace {grace}: must be 0 or more")
    if not 0 <= max_wait < float("inf"):
        raise BadInput(f"--max-wait {max_wait}: must be 0 or more")
    budget = None
    if models is not None:
        from moesaic.cli import serve_models as several

        one = {"MODEL": model != "bundled", "--name": bool(name), "--resident": resident is not None, "--tune": tune,
               "--data": data is not None, "--lossy": lossy is not None, "--prefetch-bytes": prefetch_bytes is not None,
               "--page-cache": page_cache != "direct", "--device": device not in (None, "cpu"),
               "--quantize": quantize is not None, "--device-memory": device_memory is not None}  # fmt: skip
        folders, budget = several.named(models), several.budget_of(memory, one)
    elif pin:
        raise BadInput("--pin keeps one of several models in memory: give --models with it")
    streams = None if budget is not None else streaming(
        memory, resident, policy, page_cache, experts, {"--tune": tune, "--data": data is not None}, lossy=lossy,
        prefetch_bytes=prefetch_bytes, device=None if device_memory is None else device, device_memory=device_memory,
        device_policy=device_policy,
    )  # fmt: skip
    options.check_quantize(quantize, experts, streams)
    if quantize is not None and device not in (None, "cpu"):
        raise BadInput(f"--quantize {quantize} computes on the CPU: leave --device {device} out")
    if tune != (data is not None) or (tune and policy != "lru"):
        raise BadInput("--tune chooses the policy for the text of --data FILE: give both, and no --policy")
    if streams is not None and device not in (None, "cpu") and device_memory is None:
        raise BadInput(f"--device {device}: experts that stream to it need --device-memory, what they may take there")
    if tune and device_memory is not None:
        raise BadInput(f"--tune chooses the policy of host memory: leave --device {device} out, then give it")
    keys = _keys(api_key, api_key_file)
    files = _files(steer_file)
    if files and models is not None:
        raise BadInput("--steer-file is for one model: leave --models out")
    from moesaic.serving import http

    http.require()
    from moesaic.serving.http.server import listen

    bound = listen(host, port)  # a port that is taken is known before minutes of loading
    sizes = {"max_rows": max_rows, "max_waiting": max_waiting, "max_context": max_context, "alone": alone}
    limits: dict[str, Any] = {"max_body": max_body, "timeout": timeout, "write_timeout": write_timeout, "grace": grace}
    if budget is not None:
        several.serve_models(
            folders, budget, policy=policy, pin=pin or [], max_wait=max_wait, bound=bound, keys=keys, engine=sizes,
            load={"dtype": dtype, "experts": experts, "dense_ok": dense_ok, "trust_remote_code": trust_remote_code},
            threads=threads, access_log=access_log, json=json, **limits,
        )  # fmt: skip
        return
    if tune:
        from moesaic.cli.tune import tuned

        assert streams is not None
        streams, _ = tuned(model, dtype, streams, progress_console, None, data, trust_remote_code)
    streamed = None
    if streams is not None:
        opened, streamed = open_streamed(model, dtype, trust_remote_code=trust_remote_code, **streams)
    else:
        opened = open_model(
            model, dtype, experts=experts, dense_ok=dense_ok, trust_remote_code=trust_remote_code, quantize=quantize
        )
        if device is not None:
            opened.model.to(_device(device))
    if dtype == "auto" and streams is None and quantize is None:
        from moesaic.serving.describe import widen

        widen(opened.model)
    run(
        opened.model,
        opened.tokenizer,
        source=opened.source,
        rounding=opened.rounding,
        names=name or [Path(str(opened.source)).name if model != "bundled" else model],
        bound=bound,
        keys=keys,
        engine=sizes,
        streamed=streamed,
        threads=threads,
        access_log=access_log,
        json=json,
        files=files,
        **limits,
    )


def run(
    model: Any,
    tokenizer: Any,
    *,
    source: Any,
    names: list[str],
    bound: Any,
    keys: list[str],
    engine: dict[str, Any],
    rounding: Any = None,
    streamed: Any = None,
    threads: int | None,
    max_body: int,
    timeout: float,
    write_timeout: float,
    grace: float,
    access_log: bool,
    json: bool,
    files: dict[str, str] | None = None,
) -> None:
    """Serve a loaded model, wherever it came from, until a signal. `streamed`: what serves its experts from disk."""
    import torch

    from moesaic.serving.describe import allow_packing, choose_threads, describe
    from moesaic.serving.http.app import build
    from moesaic.serving.http.engine import Engine
    from moesaic.serving.http.server import Server, serve
    from moesaic.serving.http.service import Service
    from moesaic.serving.rounding import rounding_of
    from moesaic.serving.streamed.describe import live_facts
    from moesaic.steering.spec import steering

    if streamed is None:
        allow_packing(model)
    facts, rounding = describe(model, source, rounding), rounding or rounding_of(source)
    if streamed is not None and streamed.engine.lossy is not None:
        mode = streamed.engine.lossy
        facts["exact"] = facts["exact"] and streamed.engine.exact
        facts["lossy"] = {"mode": mode.entry.name, "options": mode.options}
    facts["threads"], why = choose_threads(facts, threads)
    made = Engine(model, tokenizer, threads=torch.get_num_threads(), **engine)
    live = None if streamed is None else partial(live_facts, streamed.engine)
    service = Service(made, names, timeout, write_timeout, facts, live, partial(steering, files=files or {}))
    app = build(service, keys=keys, max_body=max_body)
    server = Server(app, made, grace=grace, access_log=access_log)
    address, port = bound.getsockname()[:2]
    url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

    def ready() -> None:
        if json:
            emit({"url": url, "host": address, "port": port, "models": names, "keys": len(keys), **facts})
            sys.stdout.flush()
            return
        out = progress_console
        out.print(
            f"[bold]{url}[/bold]  the live page; [bold]{url}/v1[/bold] the API; models: {', '.join(names)}", highlight=False
        )
        if facts["layers"]:
            shape = f"{facts['layers']} MoE layers of {facts['experts']} experts, top {facts['top_k']}"
            out.print(f"[dim]{shape}; {facts['dtype']} on {facts['device']}, threads {facts['threads']} ({why})[/dim]")
        if rounding is not None:
            out.print(f"[yellow]not exact: {rounding}[/yellow]")
        if streamed is not None and not streamed.engine.exact:
            out.print(f"[yellow]not exact: {streamed.engine.lossy} changes which experts run[/yellow]")
        if not keys and address not in ("127.0.0.1", "::1"):
            out.print("[yellow]no --api-key: everyone who reaches this address can use it[/yellow]")

    serve(server, bound, ready)


def _keys(given: list[str] | None, file: Path | None) -> list[str]:
    keys = list(given or [])
    if file is not None:
        try:
            keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
        if not keys:
            raise BadInput(f"--api-key-file {file}: no key in it, and without one the server would be open")
    if any(not key.strip() or not key.isascii() for key in keys):
        raise BadInput("--api-key: a key is ASCII text and not empty")
    return [key.strip() for key in keys]


def _files(given: list[str] | None) -> dict[str, str]:
    """Names that requests use -> paths that they never see."""
    files: dict[str, str] = {}
    for word in given or []:
        name, equals, path = word.partition("=")
        if not equals or not name.strip() or not Path(path).is_file():
            raise BadInput(f"--steer-file {word!r}: give NAME=FILE, and a file that is there")
        files[name.strip()] = path
    return files


def _check(**values: float) -> None:
    for name, value in values.items():
        lowest = 0 if name == "max_waiting" else 1 if isinstance(value, int) else 0.001
        if not lowest <= value < float("inf"):
            raise BadInput(f"--{name.replace('_', '-')} {value}: must be at least {lowest}")


def _device(name: str) -> Any:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


app = single(serve)
