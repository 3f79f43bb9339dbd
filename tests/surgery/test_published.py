"""Defaults that are the numbers of the cards (surgery-and-steering.md), and which results stock classes load (section B).
A default that is ours, where a card gives none, is not in these tables."""

from __future__ import annotations

import inspect
import math

import pytest

from moesaic.core import registry
from moesaic.experts.maestro import Factors
from moesaic.models.upcycled import bam
from moesaic.surgery import attribution, gates, memory, progressive
from moesaic.surgery.planning import LAYERWISE
from moesaic.surgery.recovery import Recovery
from moesaic.surgery.trained import Training
from moesaic.surgery.upcycle import read_me

OF_THE_CARDS = {
    ("prune", "dern"): {"alpha": 0.6, "rounds": 30, "gate": True, "normalise": False},
    ("prune", "reap"): {"scope": "uniform", "protect": False},
    ("prune", "moe_i2"): {"population": 100, "generations": 50, "mutation": 0.1},
    ("merge", "m_smoe"): {
        "similarity": "router_logits", "scope": "global", "weights": "frequency", "align": "weight", "router": "map",
    },
    ("merge", "hc_smoe"): {"linkage": "average", "feature": "output", "weights": "frequency", "align": "none", "router": "map"},
    ("merge", "uncurl"): {"router": "collapse", "weights": "frequency", "align": "weight"},
    ("merge", "sub_moe"): {"router": "map", "weights": "frequency", "rank": None},
    ("compress", "mc_smoe"): {
        "rho": 0.15, "beta": 0.85, "warm_up": 100, "cool_down": 400, "kd": 0.2, "temperature": 2.0, "task": 1.0, "train": "all",
    },
    ("compress", "d2_moe"): {"base": "fisher", "whiten": True, "share": "none"},
    ("compress", "maestro"): {"lam": 5e-3},
    ("quantize", "pmq"): {"alpha": 1.0, "beta": 1.5, "gamma": 1.0, "rounding": "gptq"},
    ("upcycle", "sparse"): {"every": 2, "normalised": True, "router": "random"},
    ("upcycle", "granular"): {"scale": "down", "normalised": True},
    ("upcycle", "btx"): {"k": 2, "every": 1},
    ("upcycle", "bam"): {"renormalised": False},
    ("upcycle", "read_me"): {"rate": 0.5, "rounds": 5, "router_steps": 100, "expert_steps": 200},
    ("upcycle", "dense2moe"): {"experts": 12, "k": 2, "shared": 0.25, "score": "taylor"},
    ("upcycle", "twin_merging"): {"density": 0.1, "scale": 0.3, "epochs": 50, "router_lr": 5e-4},
    ("distill", "recover"): {"kd": 0.2, "temperature": 2.0, "task": 1.0},
    ("distill", "llava_mod"): {"experts": 4, "k": 2, "every": 2, "aux": 0.01, "beta": 0.1},
    ("distill", "dense2moe"): {"aux": 0.01},
    ("distill", "tgeo_kd"): {"tau": 1.5, "controller_lr": 0.1},
    ("edit", "compressed_experts"): {"main": None, "vectors": 1},
    ("edit", "moepp"): {"constants": 2, "copies": 1, "zeros": 1, "bias": -20.0},
    ("edit", "evomoe"): {"zeroed": 0.2, "hot": 2.0, "cold": 0.3},
    ("edit", "gw_moe"): {"slots": 8, "threshold": None},
    ("unlearn", "seuf"): {"experts": 1, "anchor": 1.0, "retain_weight": 1.0},
    ("unlearn", "npo"): {"beta": 0.1},
    ("unlearn", "rmu"): {"retain_weight": 1200.0},
}  # fmt: skip

NOT_STOCK = {
    ("prune", "moe_i2"): "layers lose unequal numbers",
    ("prune", "layer_drop"): "a silenced layer keeps what its router needs",
    ("merge", "m_smoe"): "rows share experts", ("merge", "hc_smoe"): "rows share experts",
    ("merge", "sub_moe"): "rows share experts", ("merge", "mean"): "rows share experts",
    ("merge", "frequency"): "rows share experts",
    ("compress", "low_rank"): "factors", ("compress", "moe_i2"): "factors", ("compress", "d2_moe"): "factors",
    ("compress", "mc_smoe"): "factors and rows", ("compress", "maestro"): "factors",
}  # fmt: skip
STOCK_IF = (
    ("merge", "m_smoe", {"router": "collapse", "scope": "uniform"}), ("merge", "hc_smoe", {"router": "collapse"}),
    ("merge", "hc_smoe", {"router": "repeat"}), ("compress", "d2_moe", {"store": "dense"}),
    ("compress", "moe_i2", {"store": "dense"}), ("compress", "low_rank", {"store": "dense"}),
)  # fmt: skip


@pytest.mark.parametrize("key", OF_THE_CARDS, ids="-".join)
def test_defaults_are_those_of_the_cards(key):
    parameters = registry.get(*key).parameters
    assert {name: parameters[name].default for name in OF_THE_CARDS[key]} == OF_THE_CARDS[key]


def test_no_method_is_forgotten():
    """Methods named here have no number of a card among their options."""
    without = {
        "prune": {
            "co_selection", "ean", "frequency", "gate_mass", "gradient_norm", "layer_drop", "naee", "output_variance", "random",
            "router_norm", "similarity", "stable_rank", "weight_norm", "weighted_ean", "weighted_frequency",
        },
        "merge": {"frequency", "mean"},
        "compress": {"low_rank", "moe_i2", "neurons"},
        "quantize": {"awq", "edgemoe", "gptq", "hqq", "rtn"},
        "upcycle": {"dense"},
        "distill": set(),
        "edit": {"adamoe"},
        "unlearn": {"ga", "graddiff"},
    }  # fmt: skip
    for family, names in without.items():
        assert {entry.name for entry in registry.entries(family)} == names | {
            key[1] for key in OF_THE_CARDS if key[0] == family
        }


def test_numbers_that_are_no_options():
    assert gates.STD == 0.02 and bam.BALANCE == {"switch": 0.01, "z": 0.001}
    assert inspect.signature(memory.in_rounds).parameters["share"].default == 0.125
    assert (read_me.DECAY, len(read_me.QUANTILES)) == (0.8, 5)
    assert inspect.signature(Factors.shrink).parameters["threshold"].default == 1e-5
    assert attribution.ENOUGH > 100_000 and Training().lr == 1e-4
    assert inspect.signature(progressive.cubic).parameters["cool_down"].default == 400
    assert (Recovery().kd, Recovery().temperature, Recovery().task) == (0.2, 2.0, 1.0)
    router = registry.get("routing", "gw_moe").build(8, 8)
    assert router.threshold == pytest.approx(1.6) and router.threshold / math.log(8) == pytest.approx(0.77, abs=0.001)
    assert registry.get("routing", "evomoe").build(8, 8).threshold == 0.001


def test_what_comes_out_is_stock_as_section_b_says():
    for family in LAYERWISE:
        for entry in registry.entries(family):
            assert entry.build().stock == ((family, entry.name) not in NOT_STOCK), entry.name
    assert all(registry.get(family, name).build(**options).stock for family, name, options in STOCK_IF)
    assert not registry.get("prune", "reap").build(scope="global").stock
