"""Specialisation: how far domain, token id and position decide the experts, against routing at random.

r(g, e) is the share of the choices of group g that go to expert e. OpenMoE's score of a group is the standard deviation of
r(g, e) over the experts, for groups seen often enough. The context-independence index is the mean over tokens of the
largest r(id, e) of their id: 1/E when ids do not matter (and ids are frequent), 1/K when the id alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.file import Trace
from moesaic.trace.statistics import rows
from moesaic.trace.statistics.groups import Counted, count_groups, frequent_ids, frequent_positions
from moesaic.trace.statistics.result import Statistic, mean, plain


@dataclass(frozen=True)
class Groups(Statistic):
    """Groups of tokens that are seen often enough, and where their choices go; V counts groups.

    Attributes:
        ids_V: which (index of the domain, token id, position). tokens_LV: tokens of each that the layer routes.
        ratio_LVE: r, NaN for a group that the layer sees too rarely. score_LV: its standard deviation over the experts.
        baseline_LV: the score of the same tokens routed uniformly at random.
        mean_L, baseline_L: score and baseline, averaged over groups.
    """

    ids_V: np.ndarray
    tokens_LV: np.ndarray
    ratio_LVE: np.ndarray
    score_LV: np.ndarray
    baseline_LV: np.ndarray
    mean_L: np.ndarray
    baseline_L: np.ndarray


@dataclass(frozen=True)
class Specialisation(Statistic):
    """Per layer.

    Attributes:
        domain, token, position: the groups; None where domains or token ids are not recorded.
        domains, domain_rate_LDE: share of a domain's tokens that choose each expert (OLMoE's domain specialisation; K/E
            for an expert that does not care).
        vocabulary_LE: mean share of an id's tokens that choose the expert, over the ids that choose it most (OLMoE's
            vocabulary specialisation); NaN for an expert that leads no id.
        index_L: context independence. index_null_L: of the same tokens routed at random. index_floor_L, index_ceiling_L:
            1/E and 1/K.
    """

    domain: Groups | None
    token: Groups | None
    position: Groups
    domains: tuple[str, ...]
    domain_rate_LDE: np.ndarray
    vocabulary_LE: np.ndarray
    index_L: np.ndarray
    index_null_L: np.ndarray
    index_floor_L: np.ndarray
    index_ceiling_L: np.ndarray

    def to_json(self) -> dict[str, Any]:
        found = super().to_json()
        for name in ("domain", "token", "position"):
            groups = getattr(self, name)
            found[name] = groups.to_json() if groups else None
        return found

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in ("domain", "token", "position"):
            groups = getattr(self, name)
            if groups is not None and len(groups.ids_V):
                found[name] = {"groups": len(groups.ids_V), "score": mean(groups.mean_L)}
                found[name]["score_of_random_routing"] = mean(groups.baseline_L)
        if np.isfinite(self.index_L).any():
            found["context_independence"] = mean(self.index_L)
            found["context_independence_of_random_routing"] = mean(self.index_null_L)
            found["context_independence_ceiling"] = mean(self.index_ceiling_L)
        return plain(found)

    def by_layer(self) -> list[dict[str, Any]]:
        found = []
        for l in range(len(self.index_L)):
            row: dict[str, Any] = {"context_independence": self.index_L[l], "context_independence_null": self.index_null_L[l]}
            for name in ("domain", "token", "position"):
                groups = getattr(self, name)
                if groups is not None:
                    row |= {f"{name}_score": groups.mean_L[l], f"{name}_score_null": groups.baseline_L[l]}
            found.append({"specialisation": plain(row)})
        return found


@register(
    "statistics",
    "specialisation",
    paper="2402.01739",
    card="layers-and-balancing.md#openmoe-measuring-context-independent-specialisation-and-dropping",
)
def specialisation(trace: Trace, *, more_than: int = 128, seed: int = 0) -> Specialisation:
    """Scores by domain, token id and position, and the context-independence index; see the classes for the fields.

    Args:
        more_than: groups with this many tokens or fewer are left out: their ratios are mostly noise.
        seed: of the random routing that the baselines are.

    Raises:
        BadInput: an empty trace, or `more_than` below 0.
    """
    if more_than < 0:
        raise BadInput(f"more_than {more_than}: must be at least 0")
    if not len(trace):
        raise BadInput(f"{trace.name} holds no tokens: nothing was recorded")
    layers, experts = len(trace.layers), trace.num_experts

    def position(block: rows.Rows) -> np.ndarray:
        return np.arange(block.starts_s1[-1]) - block.starts_s1[:-1][block.sequence_t]

    def domain(block: rows.Rows) -> np.ndarray:
        return trace.domain_S[block.sequences][block.sequence_t]

    def token(block: rows.Rows) -> np.ndarray:
        assert trace.tokens_T is not None
        return np.asarray(trace.tokens_T[block.rows], np.int64)

    by_position = count_groups(trace, position, frequent_positions(trace, more_than), more_than, seed)
    by_domain = count_groups(trace, domain, np.arange(len(trace.domains)), more_than, seed) if trace.domains else None
    by_token = (
        count_groups(trace, token, frequent_ids(trace, more_than), more_than, seed) if trace.tokens_T is not None else None
    )
    unknown = np.full(layers, np.nan)
    index, null, vocabulary = unknown, unknown, np.full((layers, experts), np.nan)
    if by_token is not None:
        found, at_random = by_token
        index, null = _index(found), _index(at_random)
        vocabulary = _vocabulary(found)
    rate = np.zeros((layers, 0, experts))
    if by_domain is not None:
        rate = np.full((layers, len(trace.domains), experts), np.nan)
        counts = by_domain[0]
        rate[:, counts.ids_V] = np.where(counts.kept_LV[..., None], counts.per_token_LVE, np.nan)
    return Specialisation(
        by_domain and _scored(*by_domain), by_token and _scored(*by_token), _scored(*by_position), trace.domains, rate,
        vocabulary, index, null, 1 / trace.experts_L, 1 / rows.top_k_L(trace),
    )  # fmt: skip


def _scored(found: Counted, at_random: Counted) -> Groups:
    score, baseline = found.score_LV, at_random.score_LV
    means = [mean(table, 1) for table in (score, baseline)]
    return Groups(found.ids_V, found.tokens_LV, found.ratio_LVE, score, baseline, *means)


def _index(found: Counted) -> np.ndarray:
    """Mean over tokens of the largest ratio of their id, per layer."""
    largest = np.where(found.kept_LV, np.nan_to_num(found.ratio_LVE).max(2, initial=0), 0)
    weight = np.where(found.kept_LV, found.tokens_LV, 0)
    total = weight.sum(1)
    return np.divide((weight * largest).sum(1), total, out=np.full(len(total), np.nan), where=total > 0)


def _vocabulary(found: Counted) -> np.ndarray:
    rate_LVE = np.nan_to_num(found.per_token_LVE)
    layers, experts = len(rate_LVE), rate_LVE.shape[2]
    out = np.full((layers, experts), np.nan)
    if not len(found.ids_V):
        return out
    leader_LV, top_LV = rate_LVE.argmax(2), rate_LVE.max(2)
    for l in range(layers):
        kept = found.kept_LV[l]
        led = np.bincount(leader_LV[l, kept], minlength=experts)
        total = np.bincount(leader_LV[l, kept], top_LV[l, kept], minlength=experts)
        out[l] = np.divide(total, led, out=np.full(experts, np.nan), where=led > 0)
    return out
