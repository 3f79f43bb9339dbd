"""`moesaic`: a table of commands. A command's module is imported when it is called, so `--help` stays instant."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "run": "generate text with a MoE and see which experts did it",
    "serve": "an OpenAI-compatible server with a live page",
    "eval": "bits per byte and perplexity per domain",
    "train": "train a model from a config file",
    "sweep": "train many cells over one recipe, side by side; resumable",
    "lab": "the comparison of all routers, banks and layers",
    "search-loss": "evolve balance losses by short training runs",
    "distill": "a student learns from a teacher, and becomes a MoE on the way",
    "unlearn": "make a model forget a text by editing one expert",
    "edit": "compressed, null or zero-computation experts in a trained model, and other edits",
    "retrofit": "put another router into a trained model, and fine-tune it",
    "steer": "what steering methods need: maps of behaviours, references, stores, adapters",
    "surgery": "several steps of surgery on a checkpoint, by a recipe",
    "fit": "which of pruning, rounding and streaming makes a model fit, measured",
    "prune": "fewer experts, chosen by what a text showed",
    "merge": "several experts become one",
    "compress": "the same experts, each smaller: fewer neurons, low rank",
    "quantize": "experts in few bits, by what a text showed",
    "upcycle": "dense models become a MoE, or a MoE a dense model",
    "view": "list a model's experts; --coverage checks every architecture",
    "trace": "record which experts every token of a text chooses",
    "analyze": "statistics of a routing trace: load, locality, specialisation",
    "replay": "simulate expert caches on a trace, one policy or all",
    "report": "a routing trace in pictures: one HTML page that works offline",
    "pack": "a copy of a checkpoint that streams faster, its experts in fewer bits if you like",
    "calibrate": "collect per-expert statistics for surgery, in one pass over a text",
    "traces": "show, merge, slice and convert routing traces",
    "theory": "claims about routing as experiments, with plots",
    "bench": "measure against peers and the floor",
    "systems": "every method, its paper and its state",
}
"""Command -> one line of help. `moesaic NAME` runs `app` of `moesaic.cli.NAME`, dashes as underscores."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "moesaic: make a Mixture-of-Experts fit: your machine, your data, your task.\n\n"
        f"usage: moesaic COMMAND [...]\n\n{lines}\n\n"
        "`moesaic COMMAND --help` explains a command. Every command takes --json.\n"
        "Exit codes: 0 done, 1 a check failed, 2 bad input."
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0)
    if argv[0] in ("-V", "--version"):
        from moesaic import __version__

        print(__version__)
        sys.exit(0)
    if argv[0] not in COMMANDS:
        print(f"moesaic: no command {argv[0]!r}: one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    from moesaic.cli.common import invoke

    invoke(importlib.import_module(f"moesaic.cli.{argv[0].replace('-', '_')}").app, argv)
