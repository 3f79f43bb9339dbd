"""`moesaic view --coverage`: every promise of the view, checked on a tiny random model of every architecture.

Each check is a function of a `Case` that returns a fact to report and raises `Failed` where a promise does not hold.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from torch import Tensor

from moesaic.core.routing import Routing
from moesaic.view import implementation, tap, tiny
from moesaic.view.block import Block, View
from moesaic.view.load import quiet
from moesaic.view.policy import Policy

TOLERANCE = 1e-5
"""Largest relative error of our kernels against eager, in float32."""


class Failed(Exception):
    """A promise of the view that does not hold, in one sentence."""


@dataclass
class Case:
    """One tiny model, its inputs, and what a call did inside before the view touched it."""

    model: Any
    inputs: dict[str, Tensor]
    view: View
    before: Tensor
    inside: dict[str, list[Any]] = field(default_factory=dict)

    def run(self, model: Any = None) -> Tensor:
        with torch.no_grad():
            return first_floats((self.model if model is None else model)(**self.inputs))


def first_floats(output: Any) -> Tensor:
    """The main output of a model: its first floating tensor."""
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())


def check(name: str) -> dict[str, Any]:
    """The report of one architecture: {ok, reason, blocks, models, checks, seconds}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: a thread pool would cost more than it gives, and processes fight over cores
    try:
        with quiet():
            return _check(name)
    finally:
        torch.set_num_threads(threads)


def _check(name: str) -> dict[str, Any]:
    start = time.perf_counter()
    report: dict[str, Any] = {"ok": False, "reason": "", "blocks": 0, "models": [], "checks": {}}
    step = "building"
    try:
        architecture = next(a for a in tiny.architectures() if a.name == name)
        held: set[str] = set()
        for model_class in tiny.model_classes(architecture):
            report["models"].append(model_class.__name__)
            step = "building"
            case = open_case(model_class, architecture)
            report["blocks"] += len(case.view)
            held |= {type(block.experts).__name__ for block in case.view}
            for step, promise in PROMISES.items():
                report["checks"][step] = _worst(report["checks"].get(step), promise(case))
        if set(architecture.experts) - held:
            raise Failed(f"no model could be built that holds {', '.join(set(architecture.experts) - held)}")
        report["ok"] = True
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        report["reason"] = f"{step}: {lines[0]}" if isinstance(error, Failed) else f"{step}: {type(error).__name__}: {lines[0]}"
        report["checks"].setdefault(step, False)
    report["seconds"] = round(time.perf_counter() - start, 2)
    return report


def open_case(model_class: Any, architecture: tiny.Architecture) -> Case:
    model = tiny.build(model_class)
    model.set_experts_implementation("eager")
    given = tiny.inputs(model)
    with torch.no_grad():
        before = first_floats(model(**given))
    if not torch.isfinite(before).all():
        raise Failed("the tiny model itself gives values that are not finite")
    case = Case(model, given, View(model), before)
    decorated = [m for m in model.modules() if type(m).__name__ in architecture.experts]
    if len(case.view) != len(decorated):
        raise Failed(f"found {len(case.view)} of {len(decorated)} blocks")
    return case


def attached(case: Case) -> bool:
    """The output is bitwise the same with a view open and hooks that only look."""
    with case.view.on_route(lambda routing, block: None), case.view.on_experts(lambda x, routing, y, block: None):
        _same(case.run(), case.before, "the output changes when hooks only look")
    _same(case.run(), case.before, "the output changes after hooks are taken off")
    return True


def traced(case: Case) -> bool:
    """Every block reports ids and weights [T, K] within its experts, with the router's own scores."""
    seen: dict[str, tuple[Routing, Tensor]] = {}
    with case.view.on_experts(lambda x, routing, y, block: seen.__setitem__(block.name, (routing, x))):
        case.run()
    for block in case.view:
        if block.name not in seen:
            raise Failed(f"{block.name} was not traced")
        routing, x_TD = seen[block.name]
        ids, weights = tap.token_major(routing)
        if ids.shape != (x_TD.shape[0], block.top_k) or weights.shape != ids.shape:
            raise Failed(f"{block.name}: ids {list(ids.shape)} for {x_TD.shape[0]} tokens and k {block.top_k}")
        if int(ids.max()) >= block.num_experts or routing.logits_TE.shape != (ids.shape[0], block.num_experts):
            raise Failed(f"{block.name}: ids or logits do not fit {block.num_experts} experts")
        if block.scores == "rebuilt":
            raise Failed(f"{block.name}: its router's scores were not found")
    return True


def routed(case: Case) -> bool:
    """`block.route(x)` outside equals what the block did inside, for the x that its router saw."""
    for block in case.view:
        inside, x, context = _observe(case, block)
        with torch.no_grad():
            outside = block.route(x, **context)
        for name in ("experts_TK", "weights_TK", "logits_TE"):
            _same(getattr(outside, name), getattr(inside, name), f"{block.name}: route() outside differs in {name}")
    return True


def replaced(case: Case) -> bool:
    """An expert that is used is replaced, which changes the output, and put back, which restores it bitwise."""
    for block in (case.view[0], case.view[-1]):
        used = _used(case, block)
        kept = block.bank[used]
        block.bank[used] = kept.map(lambda tensor: -2 * tensor)
        if torch.equal(case.run(), case.before):
            raise Failed(f"{block.name}: replacing expert {used} did not change the output")
        block.bank[used] = kept
        _same(case.run(), case.before, f"{block.name}: putting expert {used} back did not restore the output")
        _same_rows(block)
    return True


def kernels(case: Case) -> float:
    """Largest relative error of our kernels against eager: of every block's experts, and of the model's output."""
    calls: dict[str, tuple[Tensor, Routing, Tensor]] = {}
    with case.view.on_experts(lambda x, routing, y, block: calls.__setitem__(block.name, (x, routing, y))):
        case.run()
    worst = 0.0
    case.model.set_experts_implementation(implementation.NAME)
    try:
        for block in case.view:
            x_TD, routing, y_TD = calls[block.name]
            with torch.no_grad():
                ours = block.experts(x_TD, *tap.token_major(routing))
            worst = max(worst, relative_error(ours, y_TD))
        worst = max(worst, relative_error(case.run(), case.before))
    finally:
        case.model.set_experts_implementation("eager")
    if not worst <= TOLERANCE:
        raise Failed(f"our kernels differ from eager by {worst:.1e}")
    return worst


def steered(case: Case) -> bool:
    """Other k, experts ruled out and experts forced are what every block then runs."""
    view = case.view
    widths = {block.name: block.top_k for block in view}
    usable = {name: k - 1 if k > 1 else k + 1 for name, k in widths.items()}
    for block, routing in _routings(case, Policy(k=usable)):
        if tap.token_major(routing)[0].shape[1] != usable[block.name]:
            raise Failed(f"{block.name}: k {usable[block.name]} was not respected")
    favourite = {block.name: [_used(case, block)] for block in view}
    for block, routing in _routings(case, Policy(without=favourite)):
        ids, weights = tap.token_major(routing)
        if ((ids == favourite[block.name][0]) & (weights != 0)).any():
            raise Failed(f"{block.name}: expert {favourite[block.name][0]} was chosen though ruled out")
    forced = {}
    for block, routing in _routings(case, None):
        ids = tap.token_major(routing)[0]
        order = torch.rand(ids.shape[0], block.num_experts, generator=torch.Generator().manual_seed(2)).argsort(1)
        forced[block.name] = order[:, : ids.shape[1]]
    for block, routing in _routings(case, Policy(force=forced)):
        if not torch.equal(tap.token_major(routing)[0].sort(1).values, forced[block.name].sort(1).values):
            raise Failed(f"{block.name}: forced experts were not used")
    _same(case.run(), case.before, "the output changes after a policy is over")
    return True


def saved(case: Case) -> bool:
    """With an expert replaced, save_pretrained and stock from_pretrained give the same output."""
    block = case.view[0]
    used = _used(case, block)
    kept = block.bank[used]
    block.bank[used] = kept.map(lambda tensor: tensor.flip(0))
    try:
        expected = case.run()
        with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
            case.model.save_pretrained(folder)
            again = type(case.model).from_pretrained(folder, experts_implementation="eager").eval()
            for parameter in again.parameters():
                # Loaded tensors lie where the file put them; BLAS rounds differently at other alignments.
                parameter.data = parameter.data.clone()
            _same(case.run(again), expected, "the reloaded model gives another output")
    finally:
        block.bank[used] = kept
    return True


PROMISES: dict[str, Callable[[Case], Any]] = {
    "attached": attached,
    "traced": traced,
    "routed": routed,
    "replaced": replaced,
    "kernels": kernels,
    "steered": steered,
    "saved": saved,
}


def names(only: str | None = None) -> list[str]:
    """Architectures whose name matches one of the comma-separated patterns; all of them for None."""
    patterns = None if only is None else [pattern.strip() for pattern in only.split(",")]
    return [a.name for a in tiny.architectures() if patterns is None or any(fnmatch(a.name, p) for p in patterns)]


def run(wanted: list[str], jobs: int = 2) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, report) of each architecture, in order."""
    if jobs <= 1:
        yield from ((name, check(name)) for name in wanted)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(check, wanted), strict=True)


def summarise(reports: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The command's JSON object."""
    architectures = dict(sorted(reports))
    return {
        "total": len(architectures),
        "supported": sum(report["ok"] for report in architectures.values()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tolerance": TOLERANCE,
        "architectures": architectures,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# Architectures that the view covers",
        "",
        f"**{result['supported']} of {result['total']}** modelling files of transformers {result['transformers']} that keep "
        f"their experts behind its experts decorator, each as a tiny random model in float32 (torch {result['torch']}). "
        "Made by `moesaic view --coverage --markdown docs/coverage.md`; do not edit.",
        "",
        "What each column promises:",
        "",
        *[f"- **{step}**: {(promise.__doc__ or '').splitlines()[0]}" for step, promise in PROMISES.items()],
        "",
        f"| architecture | models | blocks | {' | '.join(PROMISES)} |",
        f"|---|---|---|{'---|' * len(PROMISES)}",
    ]
    for name, report in result["architectures"].items():
        cells = [_cell(report["checks"].get(step)) for step in PROMISES]
        lines.append(f"| {name} | {', '.join(report['models'])} | {report['blocks']} | {' | '.join(cells)} |")
    failures = [f"- **{name}**: {report['reason']}" for name, report in result["architectures"].items() if not report["ok"]]
    lines += ["", "## Exceptions", "", *(failures or ["None."]), ""]
    return "\n".join(lines)


def _cell(fact: Any) -> str:
    if isinstance(fact, float):
        return f"{fact:.0e}"
    return "yes" if fact is True else "**no**" if fact is False else "not reached"


def relative_error(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm().clamp(min=1e-30))


def _observe(case: Case, block: Block) -> tuple[Routing, Tensor, dict[str, Any]]:
    """What one block did in a run: its routing, the x of its router, and what else its block was given."""
    seen: dict[str, Any] = {}

    def at_parent(module: Any, args: tuple, kwargs: dict) -> None:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        values = list(bound.items())[1:]
        seen["x"], seen["context"] = values[0][1], {k: v for k, v in values[1:] if isinstance(v, Tensor)}

    def at_router(module: Any, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen["own"] = x.numel() == seen["x"].numel() and torch.equal(x.reshape(-1), seen["x"].reshape(-1))
        seen["router_x"] = x

    handles = [
        block.parent.register_forward_pre_hook(at_parent, with_kwargs=True),
        block.router.register_forward_pre_hook(at_router, with_kwargs=True),
        block.on_route(lambda routing, _: seen.__setitem__("routing", routing)),
    ]
    try:
        case.run()
    finally:
        for handle in handles:
            handle.remove()
    return seen["routing"], seen["router_x"], seen["context"] if seen["own"] else {}


def _routings(case: Case, policy: Policy | None) -> list[tuple[Block, Routing]]:
    seen: list[tuple[Block, Routing]] = []
    with case.view.policy(policy), case.view.on_route(lambda routing, block: seen.append((block, routing))):
        case.run()
    return seen


def _used(case: Case, block: Block) -> int:
    """The expert that carries the largest weight in one run."""
    seen: list[Routing] = []
    with block.on_route(lambda routing, _: seen.append(routing)):
        case.run()
    ids, weights = tap.token_major(seen[0])
    return int(ids.reshape(-1)[weights.abs().reshape(-1).argmax()])


def _same_rows(block: Block) -> None:
    """The bank runs sorted rows as the block's own module does."""
    generator = torch.Generator().manual_seed(3)
    rows, experts = 2 * block.num_experts, block.num_experts
    x_SD = torch.randn(rows, block.bank.width, generator=generator)
    with torch.no_grad():
        ours = block.bank(x_SD, torch.arange(0, rows + 1, 2))
        theirs = block.experts(x_SD, torch.arange(experts).repeat_interleave(2)[:, None], torch.ones(rows, 1))
    if not relative_error(ours, theirs) <= TOLERANCE:
        raise Failed(f"{block.name}: bank(x, offsets) differs from the block's experts")


def _same(given: Tensor, expected: Tensor, otherwise: str) -> None:
    if given.shape != expected.shape or not torch.equal(given, expected):
        raise Failed(otherwise)


def _worst(first: Any, second: Any) -> Any:
    return second if first is None else max(first, second) if isinstance(second, float) else first and second
