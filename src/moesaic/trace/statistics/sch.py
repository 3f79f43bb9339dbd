"""SCH (segment cache best hit rate): hits of an expert cache that keeps what the next m tokens will use most.

A cache of rho K experts per layer (or rho K L for a whole model) evicts, on a miss when full, the expert with the fewest
activations in the next m tokens, of equals the one used longest ago. First uses while a slot is free count as hits.
`static` is the first version of the measure: the rho K experts that a window uses most, as a share of its choices.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import caches
from moesaic.trace.statistics.ahead import simulate
from moesaic.trace.statistics.bootstrap import Bootstrap
from moesaic.trace.statistics.caches import Pool
from moesaic.trace.statistics.result import Statistic, mean, plain
from moesaic.trace.statistics.srp import check_windows
from moesaic.trace.statistics.windows import favourites


@dataclass(frozen=True)
class SCH(Statistic):
    """By window length and cache size, for layers with a cache each and for streams whose layers share one.

    Attributes:
        windows_M: lengths m in tokens. rho_C: cache sizes in active sets. size_LC, model_size_ZC: the same in experts.
        sch_LMC, low_LMC, high_LMC: hits per choice, and the interval.
        strict_LMC: the same simulation with every first use counted as a miss. static_LMC: the first version.
        model_ZMC, model_low_ZMC, model_high_ZMC, model_strict_ZMC, model_static_ZMC: of one pool per stream.
        domains, domain_ZDMC: of the pool, within each domain.
    """

    windows_M: np.ndarray
    rho_C: np.ndarray
    size_LC: np.ndarray
    sch_LMC: np.ndarray
    low_LMC: np.ndarray
    high_LMC: np.ndarray
    strict_LMC: np.ndarray
    static_LMC: np.ndarray
    streams: tuple[str, ...]
    model_size_ZC: np.ndarray
    model_ZMC: np.ndarray
    model_low_ZMC: np.ndarray
    model_high_ZMC: np.ndarray
    model_strict_ZMC: np.ndarray
    model_static_ZMC: np.ndarray
    domains: tuple[str, ...]
    domain_ZDMC: np.ndarray

    def summary(self) -> dict[str, Any]:
        found = []
        for z, stream in enumerate(self.streams):
            for m, window in enumerate(self.windows_M):
                for c, rho in enumerate(self.rho_C):
                    row: dict[str, Any] = {"stream": stream, "window_tokens": int(window), "rho": rho}
                    row["cache_experts"] = self.model_size_ZC[z, c]
                    for name in ("", "low_", "high_", "strict_", "static_"):
                        row[name.rstrip("_") or "sch"] = getattr(self, f"model_{name}ZMC")[z, m, c]
                    row["layers_mean"] = mean(self.sch_LMC[:, m, c])
                    row["domains"] = dict(zip(self.domains, self.domain_ZDMC[z, :, m, c].tolist(), strict=True))
                    found.append(plain(row))
        return {"rows": found}

    def by_layer(self) -> list[dict[str, Any]]:
        windows = [str(window) for window in self.windows_M]
        found = []
        for sch_MC in self.sch_LMC:
            table = {f"{rho:g}": dict(zip(windows, plain(sch_MC[:, c]), strict=True)) for c, rho in enumerate(self.rho_C)}
            found.append({"sch": table})
        return found


@register(
    "statistics",
    "sch",
    paper="2505.16056",
    card="serving-and-scale.md#srp-and-sch-local-routing-consistency-metrics",
)
def sch(
    trace: Trace,
    *,
    windows: Sequence[int] = (4, 16, 64, 256),
    rho: Sequence[float] = (1, 2),
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> SCH:
    """SCH of every layer, and of each stream as one pool; see `SCH` for the fields. A cache is empty where a sequence begins.

    Args:
        windows: tokens that eviction looks ahead, and lengths of the static version's windows.
        rho: cache sizes in active sets (K experts per layer). resamples: of sequences; 0 for no intervals.

    Raises:
        BadInput: an empty trace, a window below 1, or a rho not above 0.
    """
    windows_M, rho_C = check_windows(windows), caches.check_rho(list(rho))
    bootstrap = Bootstrap(trace, resamples, confidence, seed)
    layers = _simulate(trace, caches.alone(trace), windows_M, rho_C, bootstrap)
    model = _simulate(trace, caches.pooled(trace), windows_M, rho_C, bootstrap)
    of_U = bootstrap.domain_U
    domains = [_rate(model.hits_UPMC[of_U == d].sum(0), model.uses_UP[of_U == d].sum(0)) for d in range(len(trace.domains))]
    shape = (len(trace.domains), *model.hits_UPMC.shape[1:])
    return SCH(
        windows_M,
        rho_C,
        layers.size_PC,
        *layers.rates(bootstrap),
        layers.strict_PMC,
        layers.static_PMC,
        trace.streams,
        model.size_PC,
        *model.rates(bootstrap),
        model.strict_PMC,
        model.static_PMC,
        trace.domains,
        np.array(domains).reshape(shape).swapaxes(0, 1),
    )


class Simulated(NamedTuple):
    """What a set of caches did; P counts caches."""

    size_PC: np.ndarray
    hits_UPMC: np.ndarray
    uses_UP: np.ndarray
    strict_PMC: np.ndarray
    static_PMC: np.ndarray

    def rates(self, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hits per choice, and the ends of the interval."""
        windows, sizes = self.hits_UPMC.shape[2:]
        uses = np.broadcast_to(self.uses_UP[..., None, None], (*self.uses_UP.shape, windows, 1))
        both = np.concatenate([self.hits_UPMC, uses], -1)
        low, high = bootstrap.interval(lambda x: x[..., :sizes] / x[..., sizes:], both)
        return _rate(self.hits_UPMC.sum(0), self.uses_UP.sum(0)), low, high


def _rate(hits_PMC: np.ndarray, uses_P: np.ndarray) -> np.ndarray:
    uses = uses_P[:, None, None]
    return np.divide(hits_PMC, uses, out=np.full(hits_PMC.shape, np.nan), where=uses > 0)


def _simulate(trace: Trace, pools: list[Pool], windows_M: np.ndarray, rho_C: np.ndarray, bootstrap: Bootstrap) -> Simulated:
    size_PC = caches.sizes(pools, rho_C)
    caches_, sizes, windows = len(pools), len(rho_C), len(windows_M)
    experts_P = np.array([pool.experts for pool in pools])
    hits = np.zeros((windows, bootstrap.units, caches_, sizes), np.int64)
    uses = np.zeros((windows, bootstrap.units, caches_), np.int64)
    strict = np.zeros((windows, caches_, sizes), np.int64)
    kept, active = np.zeros((windows, caches_, sizes), np.int64), np.zeros((windows, caches_), np.int64)
    with ThreadPoolExecutor(max_workers=min(windows, os.cpu_count() or 1)) as threads:
        for ids, starts, own, units in caches.blocks(trace, pools, bootstrap):

            def one(m: int, ids: Any = ids, starts: Any = starts, own: Any = own, units: Any = units) -> None:
                simulate(ids, experts_P, starts, own, units, windows_M[m], size_PC, hits[m], strict[m], uses[m])
                favourites(ids, starts, own, windows_M[m], size_PC, kept[m], active[m])

            list(threads.map(one, range(windows)))
    static = np.divide(kept, active[..., None], out=np.full(kept.shape, np.nan), where=active[..., None] > 0)
    return Simulated(
        size_PC,
        np.moveaxis(hits, 0, 2),
        uses[0],
        _rate(strict.swapaxes(0, 1), uses[0].sum(0)),
        static.swapaxes(0, 1),
    )
