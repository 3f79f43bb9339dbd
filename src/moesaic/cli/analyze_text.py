"""What `moesaic analyze` prints for people: tables of layers, windows and domains, and a sentence on each number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich import box
from rich.console import RenderableType
from rich.table import Table

from moesaic.trace.statistics.result import mean

WINDOW, RHO = 16, 2
"""What one number per layer is shown for: the window and the cache that the paper of SRP and SCH reports first."""


def render(trace: Any, found: dict[str, Any], skipped: dict[str, str], seconds: float) -> Iterator[RenderableType]:
    """The parts to print, in order."""
    yield (
        f"[bold]{trace.name}[/bold]\n{len(trace):,} tokens, {trace.choices:,} choices, {len(trace.layers)} layers, "
        f"{len(trace.domain_S):,} sequences; measured in {seconds:.1f} s"
    )
    yield layers_table(trace, found)
    yield ""
    if "srp" in found or "sch" in found:
        yield windows_table(found)
        yield ""
    if trace.domains and "load" in found and found["load"].domains:
        yield domains_table(trace, found)
        yield ""
    for name, sentence in SENTENCES.items():
        if name in found:
            yield sentence(found[name], trace)
    if "sch" in found:
        yield advice(found["sch"], found.get("reuse"), trace)
    for name, reason in skipped.items():
        yield f"[dim]{name} was left out: {reason}[/dim]"


def at(table: np.ndarray, where: np.ndarray, wanted: float) -> np.ndarray:
    """The column of the wanted window or size, or of the nearest one."""
    return table[..., int(np.abs(np.asarray(where, float) - wanted).argmin())]


def plain_table(title: str, *heads: str) -> Table:
    """A table narrow enough for a terminal of 80 columns."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def layers_table(trace: Any, found: dict[str, Any]) -> Table:
    """One row per layer and a column for each measure that was taken."""
    columns: list[tuple[str, np.ndarray]] = []
    if "balance" in found:
        b = found["balance"]
        columns += [("busiest", b.max_violation_L + 1), ("CV", b.cv_L), ("entropy", b.entropy_L)]
        columns += [("dead", b.dead_L)]
    if "srp" in found:
        columns.append(("SRP", at(found["srp"].srp_LM, found["srp"].windows_M, WINDOW)))
    if "sch" in found:
        sch = found["sch"]
        columns.append(("SCH", at(at(sch.sch_LMC, sch.rho_C, RHO), sch.windows_M, WINDOW)))
    if "reuse" in found:
        columns.append(("LRU", at(found["reuse"].hit_LC, found["reuse"].rho_C, RHO)))
    if "affinity" in found:
        bits_L = np.full(len(trace.layers), np.nan)
        bits_L[found["affinity"].pair_A2[:, 0]] = found["affinity"].mutual_bits_A
        columns.append(("bits", bits_L))
    if "specialisation" in found:
        columns.append(("id", found["specialisation"].index_L))
    if "margin" in found:
        columns.append(("margin", found["margin"].value_LQ[:, 0]))
    if "saturation" in found:
        columns.append(("kept", found["saturation"].overlap_L))
    table = plain_table("layers", "layer", "experts")
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for l, layer in enumerate(trace.layers):
        cells = [cell(values[l], 2) for _, values in columns]
        table.add_row(str(l), f"{layer.top_k} of {layer.experts}", *cells)
    return table


def windows_table(found: dict[str, Any]) -> Table:
    """SRP and SCH of the whole model by window length; a model with an encoder and a decoder has rows for each."""
    table = plain_table("locality of the whole model", "window")
    first = found.get("srp") or found["sch"]
    if len(first.streams) > 1:
        table.add_column("layers")
    heads = ["SRP", "95 %", "i.i.d.", "own", "set"] if "srp" in found else []
    if "sch" in found:
        heads += [f"SCH {rho:g}x" for rho in found["sch"].rho_C] + ["95 %"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for z, stream in enumerate(first.streams):
        for m, window in enumerate(first.windows_M):
            row = [f"{window}"] + ([stream] if len(first.streams) > 1 else [])
            if "srp" in found:
                s = found["srp"]
                row += [cell(s.model_ZM[z, m]), span(s.model_low_ZM[z, m], s.model_high_ZM[z, m])]
                row += [cell(s.model_null_ZM[z, m]), cell(s.model_even_ZM[z, m]), cell(s.model_rho_ZM[z, m])]
            if "sch" in found:
                s = found["sch"]
                row += [cell(value) for value in s.model_ZMC[z, m]]
                row.append(span(s.model_low_ZMC[z, m, -1], s.model_high_ZMC[z, m, -1]))
            table.add_row(*row)
    return table


def domains_table(trace: Any, found: dict[str, Any]) -> Table:
    """What the measures say about each domain, and its busiest experts."""
    load = found["load"]
    table = plain_table("domains", "domain")
    columns: list[tuple[str, Any]] = [("choices", load.counts_DLE.sum((1, 2)))]
    if "srp" in found:
        columns.append(("SRP", mean(at(found["srp"].domain_ZDM, found["srp"].windows_M, WINDOW), 0)))
    if "sch" in found:
        sch = found["sch"]
        columns.append(("SCH", mean(at(at(sch.domain_ZDMC, sch.rho_C, RHO), sch.windows_M, WINDOW), 0)))
    if "drops" in found:
        columns.append(("dropped", at(found["drops"].domain_FD.T, found["drops"].factors_F, 1)))
    for head, _ in columns:
        table.add_column(head, justify="right")
    table.add_column(" busiest experts (layer: expert, share)")
    for d, domain in enumerate(load.domains):
        share_LE = np.nan_to_num(load.share_DLE[d])
        order = np.argsort(share_LE, axis=None)[::-1][:3]
        busiest = [f"{i // share_LE.shape[1]}: {i % share_LE.shape[1]}, {share_LE.flat[i]:.0%}" for i in order]
        table.add_row(domain, *(cell(values[d]) for _, values in columns), " " + "  ".join(busiest))
    return table


def of_balance(b: Any, trace: Any) -> str:
    dead = int(b.dead_L.sum())
    never = (
        "every expert is chosen"
        if not dead
        else "1 expert is never chosen"
        if dead == 1
        else f"{dead} experts are never chosen"
    )
    busiest = np.nan_to_num(b.max_violation_L).max() + 1
    return (
        f"[bold]Load[/bold]: the busiest expert of a layer gets up to {busiest:.1f} times an even load; "
        f"{never}. An even load has CV 0 and entropy 1."
    )


def of_srp(s: Any, trace: Any) -> str:
    value, null = (at(table, s.windows_M, WINDOW) for table in (s.model_ZM, s.model_null_ZM))
    return (
        "[bold]SRP[/bold]: how well one fixed set of experts predicts what a window of tokens uses (F1): "
        f"{_list(value)} at {_nearest(s.windows_M, WINDOW)} tokens, {_list(null)} for random routing. `own` is random "
        "routing with this trace's loads: what is above it is locality. `set` is the size of that set over what is used."
    )


def of_sch(s: Any, trace: Any) -> str:
    return (
        "[bold]SCH[/bold]: hit rate of a cache of so many active sets of experts, shared by all layers, that knows the next "
        "tokens of its window; first uses that find a free slot count as hits."
    )


def of_reuse(r: Any, trace: Any) -> str:
    n = int(np.abs(r.tokens_N - 64).argmin())
    hit, used = mean(at(r.hit_LC, r.rho_C, RHO)), mean(r.working_set_LN[:, n])
    return (
        f"[bold]Reuse[/bold]: plain LRU with {_nearest(r.rho_C, RHO)} active sets per layer hits {hit:.0%} (first uses are "
        f"misses); {r.tokens_N[n]} tokens use {used:.1f} experts of a layer."
    )


def of_affinity(a: Any, trace: Any) -> str:
    if not len(a.pair_A2):
        return "[bold]Affinity[/bold]: one layer has no next one."
    best, chance = a.stay_AE[:, 0].mean(), a.null_stay_AE[:, 0].mean()
    stay, stay_chance = a.stay(4).mean(), a.stay(4, null=True).mean()
    return (
        f"[bold]Affinity[/bold]: an expert's likeliest successor in the next layer takes {best:.0%} of its tokens "
        f"({chance:.0%} without affinity); on 4 devices at most {stay:.0%} of the tokens could stay in place "
        f"({stay_chance:.0%}). `bits` is what a layer's experts tell about the next one's."
    )


def of_foresight(f: Any, trace: Any) -> str:
    ahead, before, usual, chance = (
        mean(table) for table in (f.ahead_LAW[1:, 0, 0], f.previous_LW[1:, 0], f.frequent_LW[1:, 0], f.chance_LW[1:, 0])
    )
    more = f", {mean(f.ahead_LAW[1:, 0, 1]):.0%} with {f.widths_W[1]}" if len(f.widths_W) > 1 else ""
    return (
        f"[bold]Foresight[/bold]: a layer's router, run on the layer before it, names {ahead:.0%} of the choices{more}; the "
        f"token before names {before:.0%}, the most used experts {usual:.0%}, chance {chance:.0%}."
    )


def of_coactivation(c: Any, trace: Any) -> str:
    best = [(layer, *pair) for layer in range(len(c.tokens_L)) for pair in c.strongest(layer, 1)]
    if not best:
        return "[bold]Co-activation[/bold]: no token chooses two experts of a layer."
    layer, a, b, share = max(best, key=lambda row: row[3])
    return (
        f"[bold]Co-activation[/bold]: the closest pair is experts {a} and {b} of layer {layer}: {share:.0%} of the tokens of "
        "one choose the other too."
    )


def of_specialisation(s: Any, trace: Any) -> str:
    parts = []
    if np.isfinite(s.index_L).any():
        index, null, most = mean(s.index_L), mean(s.index_null_L), mean(s.index_ceiling_L)
        parts.append(
            f"a token's id alone sends {index:.2f} of its choices to one expert (random {null:.2f}, at most {most:.2f})"
        )
    for name in ("domain", "token", "position"):
        groups = getattr(s, name)
        if groups is not None and np.isfinite(groups.mean_L).any():
            times = mean(groups.mean_L) / max(mean(groups.baseline_L), 1e-12)
            parts.append(f"by {name}, loads spread {times:.0f} times as much as by chance")
    return "[bold]Specialisation[/bold]: " + ("; ".join(parts) or "no group is frequent enough to tell") + "."


def of_drops(d: Any, trace: Any) -> str:
    quarter = max(d.position_FB.shape[1] // 4, 1)
    first, last = mean(d.position_FB[0, :quarter]), mean(d.position_FB[0, -quarter:])
    return (
        f"[bold]Drops[/bold]: with a capacity factor of {d.factors_F[0]:g} per sequence, {d.dropped_F[0]:.0%} of the choices "
        f"would be dropped: {first:.0%} in its first quarter, {last:.0%} in its last."
    )


def of_margin(m: Any, trace: Any) -> str:
    names = {0: "largest weight minus the next {:.2f}", 2: "lowest chosen logit minus the best one left out {:.2f}"}
    names[3] = "entropy of the router {:.2f} of its maximum"
    parts = [text.format(mean(m.value_LQ[:, q])) for q, text in names.items() if np.isfinite(m.value_LQ[:, q]).any()]
    return "[bold]Margin[/bold]: " + ("; ".join(parts) or "one slot and no logits: nothing to compare") + "."


def of_saturation(s: Any, trace: Any) -> str:
    return (
        f"[bold]Saturation[/bold]: the other checkpoint keeps {mean(s.overlap_L):.0%} of the choices (chance "
        f"{mean(s.chance_L):.0%}) and {mean(s.first_L):.0%} of the first ones."
    )


SENTENCES: dict[str, Callable[[Any, Any], str]] = {
    "balance": of_balance,
    "srp": of_srp,
    "sch": of_sch,
    "reuse": of_reuse,
    "affinity": of_affinity,
    "foresight": of_foresight,
    "coactivation": of_coactivation,
    "specialisation": of_specialisation,
    "drops": of_drops,
    "margin": of_margin,
    "saturation": of_saturation,
}


def advice(sch: Any, reuse: Any, trace: Any) -> str:
    """Whether the model is worth streaming, by the hit rate of a cache of two active sets, next to published models."""
    z = int(np.argmax(sch.model_size_ZC[:, -1]))
    hit = float(at(at(sch.model_ZMC, sch.rho_C, RHO), sch.windows_M, WINDOW)[z])
    size, total = int(at(sch.model_size_ZC, sch.rho_C, RHO)[z]), int(trace.experts_L.sum())
    if not np.isfinite(hit):
        return "[bold]Streaming[/bold]: no choices, no advice."
    verdict = "worth it" if hit >= 0.7 else "possible, and it will wait for storage" if hit >= 0.5 else "a poor fit"
    text = (
        f"[bold]Streaming[/bold]: {verdict}. Two active sets, {size} of {total} experts ({size / total:.0%}), can serve up to "
        f"{hit:.0%} of the choices from memory"
    )
    if reuse is not None:
        text += f", plain LRU {mean(at(reuse.hit_LC, reuse.rho_C, RHO)):.0%}"
    return (
        text
        + ". Published models (arXiv 2505.16056): Switch 21 %, DeepSeekMoE 57 %, Mixtral and OLMoE 74 %, LLaMA-MoE-v2 98 %."
    )


def cell(value: Any, digits: int = 3) -> str:
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def span(low: float, high: float) -> str:
    return "-" if not np.isfinite(low) else f"{low:.3f}-{high:.3f}"


def _list(values: np.ndarray) -> str:
    return " and ".join(cell(value) for value in np.atleast_1d(values))


def _nearest(where: np.ndarray, wanted: float) -> int:
    return int(where[int(np.abs(np.asarray(where, float) - wanted).argmin())])
