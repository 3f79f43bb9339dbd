"""What steering reaches in every architecture: logits all routers, probs those that score by a softmax over their experts."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import BadInput
from moesaic.view import tiny
from moesaic.view.coverage import open_case

NO_SOFTMAX = {
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v3",
    "hy_v4",
    "inkling",
    "inkling2",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl",
    "muse_spark",
    "nemotron_h",
    "solar_open",
    "zaya",
}
"""Sigmoid and softplus routers, and those with a class that is no expert."""
CORRECTED = {"ernie4_5_moe", "ernie4_5_vl_moe"}
"""Softmax routers whose choice adds a correction to the probabilities."""


def routings(case, **policy):
    found = {}
    with case.view.policy(**policy), case.view.on_route(lambda routing, block: found.__setitem__(block.name, routing)):
        return case.run(), found


def reached(case):
    """Zero logits change no bit; a large one on one expert of a block, alone, changes what that block is handed: its choice or
    its weights. (Groups, corrections and tables have their own say in which.)"""
    zero, plain = routings(case, logits={block.name: torch.zeros(block.num_experts) for block in case.view})
    assert torch.equal(zero, case.before)
    for block in (case.view[0], case.view[-1]):
        one_E = torch.nn.functional.one_hot(torch.tensor(1), block.num_experts) * 4.0
        _, moved = routings(case, logits={block.name: one_E})
        before, after = plain[block.name], moved[block.name]
        assert not (torch.equal(before.experts_TK, after.experts_TK) and torch.equal(before.weights_TK, after.weights_TK)), (
            block.name
        )


def replaced(case, corrected=False):
    """Given probabilities, the same for all tokens, decide the choice of every block, or the router is refused with the
    reason."""
    probs = {block.name: torch.arange(1.0, block.num_experts + 1) / sum(range(1, block.num_experts + 1)) for block in case.view}
    try:
        _, found = routings(case, probs=probs)
    except BadInput as error:
        return str(error)
    for block in case.view:
        best = set(range(block.num_experts - block.top_k, block.num_experts))
        chosen = {frozenset(row) for row in found[block.name].experts_TK.tolist()}
        assert len(chosen) == 1 and (corrected or chosen == {frozenset(best)}), block.name
    return None


@pytest.mark.slow
def test_logits_and_probs():
    torch.set_num_threads(1)
    refused, wrong = {}, {}
    for architecture in tiny.architectures():
        for model_class in tiny.model_classes(architecture)[:1]:
            case = open_case(model_class, architecture)
            try:
                reached(case)
                reason = replaced(case, architecture.name in CORRECTED)
            except (AssertionError, BadInput) as error:
                wrong[architecture.name] = str(error).splitlines()[0]
                continue
            if reason is not None:
                refused[architecture.name] = reason
    assert not wrong, wrong
    assert set(refused) == NO_SOFTMAX, refused
    assert all("does not score by a softmax over its experts alone; use logits or fn" in reason for reason in refused.values())
