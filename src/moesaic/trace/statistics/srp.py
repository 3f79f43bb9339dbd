"""SRP (segment routing best performance): how well one set of experts, fixed for a window of tokens, predicts its choices.

For a window w of m consecutive tokens, f(w, e) counts those that chose expert e. Predict "active throughout" where
f >= alpha: F1(alpha) = 2 sum[f >= alpha] f / (m #[f >= alpha] + sum f), sums over the windows and experts of a group with
one alpha for all of them, and SRP is the best F1. It lies between 2r/(1+r), r the activation rate, and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any, NamedTuple

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.result import Statistic, plain
from moesaic.trace.statistics.windows import slide


@dataclass(frozen=True)
class SRP(Statistic):
    """By window length, for layers, single experts, whole streams (a model has one, or encoder and decoder) and domains.

    Attributes:
        windows_M: window lengths m in tokens; NaN columns where no sequence is that long.
        srp_LM, low_LM, high_LM: of each layer, and its interval. alpha_LM: the best threshold. rho_LM: size of the
            predicted set over the experts needed, m #[f >= alpha] / sum f.
        bound_LM: 2r/(1+r), reached by predicting every expert. null_LM: i.i.d. uniform routing. even_LM: i.i.d. routing
            with the trace's own loads; what srp_LM has above it is locality, not imbalance.
        srp_LEM: of each expert alone.
        model_ZM, model_low_ZM, model_high_ZM, model_alpha_ZM, model_rho_ZM, model_bound_ZM, model_null_ZM, model_even_ZM:
            pooled over a stream's layers.
        domains, domain_ZDM: pooled, of each domain.
    """

    windows_M: np.ndarray
    srp_LM: np.ndarray
    low_LM: np.ndarray
    high_LM: np.ndarray
    alpha_LM: np.ndarray
    rho_LM: np.ndarray
    bound_LM: np.ndarray
    null_LM: np.ndarray
    even_LM: np.ndarray
    srp_LEM: np.ndarray
    streams: tuple[str, ...]
    model_ZM: np.ndarray
    model_low_ZM: np.ndarray
    model_high_ZM: np.ndarray
    model_alpha_ZM: np.ndarray
    model_rho_ZM: np.ndarray
    model_bound_ZM: np.ndarray
    model_null_ZM: np.ndarray
    model_even_ZM: np.ndarray
    domains: tuple[str, ...]
    domain_ZDM: np.ndarray

    def summary(self) -> dict[str, Any]:
        names = ("model", "model_low", "model_high", "model_alpha", "model_rho", "model_bound", "model_null", "model_even")
        rows_ = []
        for z, stream in enumerate(self.streams):
            for m, window in enumerate(self.windows_M):
                row: dict[str, Any] = {"stream": stream, "window_tokens": int(window)}
                row |= {
                    name.removeprefix("model_").replace("model", "srp"): getattr(self, f"{name}_ZM")[z, m] for name in names
                }
                row["domains"] = dict(zip(self.domains, self.domain_ZDM[z, :, m].tolist(), strict=True))
                rows_.append(row)
        return {"rows": plain(rows_)}

    def by_layer(self) -> list[dict[str, Any]]:
        names = {"srp": self.srp_LM, "srp_low": self.low_LM, "srp_high": self.high_LM, "srp_null": self.null_LM}
        windows = [str(window) for window in self.windows_M]
        return [
            {name: dict(zip(windows, plain(table[l]), strict=True)) for name, table in names.items()}
            for l in range(len(self.srp_LM))
        ]


class Best(NamedTuple):
    """The best F1 of a histogram, at which threshold, and the relative size of the set it predicts."""

    f1: np.ndarray
    alpha: np.ndarray
    rho: np.ndarray


def best(histogram_xF: np.ndarray) -> Best:
    """From pooled histograms of f, [..., m + 1]; NaN (and alpha -1) where nothing was chosen."""
    window = histogram_xF.shape[-1] - 1
    f = np.arange(window + 1)
    predicted = np.cumsum(histogram_xF[..., ::-1], -1)[..., ::-1]
    hit = np.cumsum((histogram_xF * f)[..., ::-1], -1)[..., ::-1]
    active = hit[..., :1]
    f1 = np.divide(2 * hit, window * predicted + active, out=np.zeros(hit.shape), where=active > 0)
    alpha = f1.argmax(-1)
    at = alpha[..., None]
    rho = np.divide(window * np.take_along_axis(predicted, at, -1), active, out=np.full(at.shape, np.nan), where=active > 0)
    some = active[..., 0] > 0
    value = np.where(some, np.take_along_axis(f1, at, -1)[..., 0], np.nan)
    return Best(value, np.where(some, alpha, -1), rho[..., 0])


def binomial(window: int, rate: np.ndarray) -> np.ndarray:
    """Probability of each f, 0 to m, when every token is active with probability `rate`: [..., m + 1]."""
    f = np.arange(window + 1)
    choose = np.array([lgamma(window + 1) - lgamma(i + 1) - lgamma(window - i + 1) for i in f])
    safe = np.clip(rate, 1e-300, 1 - 1e-16)[..., None]
    pmf = np.exp(choose + f * np.log(safe) + (window - f) * np.log1p(-safe))
    pmf[rate >= 1] = f == window
    return pmf


def independent(experts: int, rate: float, window: int) -> float:
    """SRP of i.i.d. routing that treats `experts` alike, each active in a share `rate` of the tokens."""
    return float(best(experts * binomial(window, np.array(rate))).f1)


def check_windows(windows: Sequence[int]) -> np.ndarray:
    """Raises BadInput naming a window that is no positive number of tokens."""
    for window in windows:
        if window < 1:
            raise BadInput(f"window {window}: must be at least 1 token")
    if not len(windows):
        raise BadInput("windows: name at least one length in tokens")
    return np.array(windows, np.int64)


@register(
    "statistics",
    "srp",
    paper="2505.16056",
    card="serving-and-scale.md#srp-and-sch-local-routing-consistency-metrics",
)
def srp(
    trace: Trace,
    *,
    windows: Sequence[int] = (4, 16, 64, 256),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> SRP:
    """SRP of every layer, expert, stream and domain; see `SRP` for the fields. Windows never cross the end of a sequence.

    Args:
        windows: lengths in tokens. resamples: bootstrap resamples of sequences; 0 for no intervals.

    Raises:
        BadInput: an empty trace, or a window below 1.
    """
    windows_M = check_windows(windows)
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    streams_L = rows.stream_L(trace)
    parts = [_one_window(trace, int(m), bootstrap, streams_L) for m in windows_M]
    joined = {name: np.stack([part[name] for part in parts], -1) for name in parts[0]}
    return SRP(windows_M, streams=trace.streams, domains=trace.domains, **joined)


def _one_window(trace: Trace, window: int, bootstrap: Bootstrap, streams_L: np.ndarray) -> dict[str, np.ndarray]:
    hist_ULF, hist_LEF = histograms(trace, window, bootstrap)
    hist_LF, real_LE = hist_ULF.sum(0), rows.real_LE(trace)
    found = best(hist_LF)
    # a layer at a time: resampled histograms of many layers and long windows would be large
    ends = [bootstrap.interval(lambda h: best(h).f1, hist_ULF[:, l]) for l in range(len(trace.layers))]
    low, high = (np.array([end[i] for end in ends], float) for i in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_LE = (hist_LEF * np.arange(window + 1)).sum(-1) / (window * hist_LEF.sum(-1))
    rate_L = np.where(real_LE, rate_LE, 0).sum(1) / trace.experts_L
    uniform_LF = trace.experts_L[:, None] * binomial(window, np.nan_to_num(rate_L))
    even_LF = (binomial(window, np.nan_to_num(rate_LE)) * real_LE[..., None]).sum(1)
    out = {
        "srp_LM": found.f1, "low_LM": low, "high_LM": high, "alpha_LM": found.alpha, "rho_LM": found.rho,
        "bound_LM": 2 * rate_L / (1 + rate_L), "null_LM": _known(best(uniform_LF).f1, rate_L),
        "even_LM": _known(best(even_LF).f1, rate_L), "srp_LEM": best(hist_LEF).f1,
    }  # fmt: skip
    pooled = [_pooled(hist_ULF[:, streams_L == z], bootstrap, len(trace.domains)) for z in range(len(trace.streams))]
    out |= {f"{name}_ZM" if name != "domain" else "domain_ZDM": np.stack([p[name] for p in pooled]) for name in pooled[0]}
    windows_L = hist_LF.sum(-1) / trace.experts_L
    for name, null_LF in (("model_null_ZM", uniform_LF), ("model_even_ZM", even_LF)):
        mixed = [(null_LF * windows_L[:, None])[streams_L == z].sum(0) for z in range(len(trace.streams))]
        out[name] = np.array([best(h).f1 for h in mixed])
    out["model_bound_ZM"] = np.array([_bound(hist_LF[streams_L == z].sum(0)) for z in range(len(trace.streams))])
    return out


def _known(values: np.ndarray, rate_L: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(rate_L), values, np.nan)


def _bound(histogram_F: np.ndarray) -> float:
    cells = (len(histogram_F) - 1) * histogram_F.sum()
    rate = (histogram_F * np.arange(len(histogram_F))).sum() / cells if cells else np.nan
    return 2 * rate / (1 + rate)


def _pooled(hist_ULF: np.ndarray, bootstrap: Bootstrap, domains: int) -> dict[str, Any]:
    """Over the layers of one stream: all sequences, and those of each domain."""
    hist_UF = hist_ULF.sum(1)
    found = best(hist_UF.sum(0))
    low, high = bootstrap.interval(lambda h: best(h).f1, hist_UF)
    each = [best(hist_UF[bootstrap.domain_U == d].sum(0)).f1 for d in range(domains)]
    return {
        "model": found.f1, "model_low": low, "model_high": high, "model_alpha": found.alpha, "model_rho": found.rho,
        "domain": np.array(each, float),
    }  # fmt: skip


def histograms(trace: Trace, window: int, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """How many (window, expert) pairs have each f: per unit and layer [U, L, m + 1], and per layer and expert."""
    layers, own = len(trace.layers), rows.own_SL(trace)
    rows.check_table(f"SRP with windows of {window} tokens", bootstrap.units, layers, window + 1)
    rows.check_table(f"SRP with windows of {window} tokens", layers, trace.num_experts, window + 1)
    by_unit = np.zeros((bootstrap.units, layers, window + 1), np.int64)
    by_expert = np.zeros((layers, trace.num_experts, window + 1), np.int64)
    for block in rows.sequences(trace):
        ids, units = rows.distinct(block.experts_tLK), bootstrap.unit_S[block.sequences]
        slide(ids, trace.experts_L, block.starts_s1, own[block.sequences], units, window, by_unit, by_expert)
    return by_unit, by_expert
