"""Reference numbers for test_agreement.py, made by running the reference implementations on a small seeded model and text.

    python tests/surgery/agreement/regenerate.py REAP_CLONE MC_SMOE_CLONE HC_SMOE_CLONE

Each clone is a checkout of the repository named in `SOURCES`. Nothing of theirs is changed: their functions are given the same
weights as per-expert linear layers, and `Tensor.cuda` does nothing. Writes one JSON file per repository beside this script.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

HERE = Path(__file__).parent
SOURCES = {
    "reap": "CerebrasResearch/reap",
    "mc_smoe": "UNITES-Lab/MC-SMoE",
    "hc_smoe": "wazenmai/HC-SMoE",
}
TEXT = (
    "A router looks at every token and picks the experts that shall read it. Some experts are asked often, and some hardly "
    "ever; when memory is short, somebody has to go. Which one? The one that says least, or the one that is heard least? "
    "def keep(scores, n): return sorted(scores, key=scores.get)[-n:]  # and 3.14159 * 2 = 6.28318, as everyone knows. "
    "In the harbour the ships lay still, and the rain fell on the tarred ropes, on the crates, on the sleeping dogs."
)
SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip


def build(kind: str):
    """A seeded model in float32: Mixtral (weights of the chosen two sum to one) or OLMoE (they do not)."""
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=8, **SIZES))
    else:
        model = OlmoeForCausalLM(OlmoeConfig(num_experts=8, norm_topk_prob=False, **SIZES))
    rng = np.random.default_rng(7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.from_numpy(rng.standard_normal(parameter.shape) * 0.3).float()
    model.set_experts_implementation("eager")
    return model.eval()


def batches() -> list[torch.Tensor]:
    ids = torch.tensor([ord(letter) for letter in TEXT])
    return list(ids[: len(ids) // 64 * 64].reshape(-1, 64).split(2))


class Expert(nn.Module):
    """One expert as linear layers, under the names that the repositories look for."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for names, weight in ((("gate_proj", "w1"), gate), (("up_proj", "w3"), up), (("down_proj", "w2"), down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            for name in names:
                setattr(self, name, linear)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class PerExpertBlock(nn.Module):
    """The block as transformers 4 had it: a list of experts, and the logits returned beside the output."""

    def __init__(self, block, normalised: bool) -> None:
        super().__init__()
        I = block.experts.down_proj.shape[2]
        stacks = zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
        self.experts = nn.ModuleList(Expert(gate_up[:I], gate_up[I:], down) for gate_up, down in stacks)
        self.gate, self.num_experts, self.top_k, self.normalised = block.gate.weight, len(self.experts), 2, normalised

    def forward(self, x_BND):
        x_TD = x_BND.reshape(-1, x_BND.shape[-1])
        logits_TE = x_TD @ self.gate.T
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(self.top_k)
        if self.normalised:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        every = torch.stack([expert(x_TD) for expert in self.experts])
        at = torch.arange(len(x_TD))
        y_TD = sum(weights_TK[:, k, None] * every[ids_TK[:, k], at] for k in range(self.top_k))
        return y_TD.reshape(x_BND.shape), logits_TE


def per_expert(model, normalised: bool):
    """The model with such blocks; what they return beside the output is dropped on the way."""
    for layer in model.model.layers:
        layer.mlp = PerExpertBlock(layer.mlp, normalised)
        old = layer.forward

        def forward(*args, layer=layer, old=old, **kwargs):
            block = layer.mlp
            layer.__dict__["_modules"]["mlp"] = First(block)
            try:
                return old(*args, **kwargs)
            finally:
                layer.__dict__["_modules"]["mlp"] = block

        layer.forward = forward
    return model


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def bare(package: str, folder: Path) -> None:
    """A package that runs no __init__ of its own, so that only the files that are asked for are imported."""
    made = types.ModuleType(package)
    made.__path__ = [str(folder)]
    sys.modules[package] = made


class Anything(types.ModuleType):
    """Stands in for modules that are imported and not used here."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def reap(clone: Path) -> dict:
    sys.path.insert(0, str(clone / "src"))
    bare("reap", clone / "src" / "reap")
    observer = importlib.import_module("reap.observer")
    found = {}
    for kind, normalised in (("mixtral", True), ("olmoe", False)):
        model = per_expert(build(kind), normalised)
        config = observer.MixtralMoEObserverHookConfig(
            module_class_name_to_hook_regex="PerExpertBlock", renormalize_router_weights=normalised
        )
        watch = observer.MoETransformerObserver(model, config)
        for ids in batches():
            with torch.no_grad():
                model(input_ids=ids)
        names = (
            "expert_frequency", "ean_sum", "ean_mean", "weighted_ean_sum", "weighted_expert_frequency_sum", "reap",
            "pairwise_expert_frequency", "max_activations", "characteristic_activation", "routed_characteristic_activation",
        )  # fmt: skip
        found[kind] = [{name: state[name].tolist() for name in names} for _, state in sorted(watch.report_state().items())]
    return {"function": "src/reap/observer.py MoETransformerObserver, src/reap/pruning_metrics.py", "layers": found}


def mc_smoe(clone: Path) -> dict:
    for name in ("mcsmoe", "mcsmoe.merging", "mcsmoe.utils"):
        bare(name, clone / name.replace(".", "/"))
    for name in ("mcsmoe.models", "mcsmoe.models.fsgpt_moe"):
        sys.modules[name] = Anything(name)
    grouping = importlib.import_module("mcsmoe.merging.grouping_mixtral")
    permutation = importlib.import_module("mcsmoe.merging.permutation")
    model = build("mixtral")
    loader = [{"input_ids": ids} for ids in batches()]
    found: dict = {"budgets": {}}
    for average in (2, 4, 6):
        grouper = grouping.ExpertsGrouperForMixtral(model.config)
        grouper.compute_all_usages(model, loader)
        grouper.compute_all_similarities(model, loader)
        layers = list(range(4))
        centres = grouper.group_experts_globally_from_dominant_experts(average, layers)
        found["budgets"][average] = {
            "groups": [grouper.group_state_dict()[name].tolist() for name in sorted(centres)],
            "centres": [centres[name] for name in sorted(centres)],
        }
    names = sorted(grouper.usage_frequency_state_dict())
    usage, groups = grouper.usage_frequency_state_dict(), grouper.group_state_dict()
    found["usage"] = [usage[name].tolist() for name in names]
    found["similarity"] = [grouper.similarity_state_dict()[name].tolist() for name in names]
    merged = []
    for number, name in enumerate(names):
        block = PerExpertBlock(model.model.layers[number].mlp, True)
        grouping._merge_mlp_experts_by_usage_frequency_weighting(block, groups[name], usage[name])
        merged.append([[float(expert.w1.weight[0, 0]), float(expert.w2.weight.norm())] for expert in block.experts])
    found["merged_at_6"] = merged
    rng = np.random.default_rng(3)
    pair = [types.SimpleNamespace(wi=types.SimpleNamespace(weight=torch.from_numpy(rng.standard_normal((16, 8)))),
                                  wo=types.SimpleNamespace(weight=torch.from_numpy(rng.standard_normal((8, 16)))))
            for _ in range(2)]  # fmt: skip
    found["permutation"] = permutation.compute_switch_permutation_by_weight_matching(*pair, include_wo=True).tolist()
    return {"function": "mcsmoe/merging/grouping_mixtral.py, mcsmoe/merging/permutation.py", **found}


def hc_smoe(clone: Path) -> dict:
    for name in ("hcsmoe", "hcsmoe.merging", "hcsmoe.utils"):
        bare(name, clone / name.replace(".", "/"))
    for name in ("hcsmoe.models", "hcsmoe.models.qwen", "hcsmoe.models.qwen.utils", "hcsmoe.utils.helper"):
        sys.modules[name] = Anything(name)
    grouping = importlib.import_module("hcsmoe.merging.grouping_qwen")
    clustering = importlib.import_module("hcsmoe.merging.clustering")
    model = per_expert(build("olmoe"), False)
    config = types.SimpleNamespace(
        num_experts=8, hidden_size=32, moe_intermediate_size=16, num_experts_per_tok=2, num_hidden_layers=4
    )
    found: dict = {}
    for linkage in ("average", "ward", "single"):
        for count in (2, 4, 6):
            grouper = grouping.ExpertsGrouperForQwen2MoE(config, cluster="hierarchical", linkage=linkage)
            # Their hook takes the block's input, which our blocks get as theirs did.
            grouper.group_experts_by_clustering_output(model, [{"input_ids": ids} for ids in batches()], count)
            labels = grouper.group_state_dict()
            found[f"{linkage} {count}"] = [labels[name].tolist() for name in sorted(labels)]
    rng = np.random.default_rng(5)
    points = torch.from_numpy(rng.standard_normal((24, 6))).float()
    free = {linkage: clustering.hierarchical_clustering(points, 7, linkage)[0].tolist() for linkage in ("average", "ward")}
    return {
        "function": "hcsmoe/merging/grouping_qwen.py group_experts_by_clustering_output, hcsmoe/merging/clustering.py",
        "groups": found,
        "points_seed": 5,
        "points_groups": free,
    }


def main(clones: list[str]) -> None:
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    for (name, repository), clone, run in zip(SOURCES.items(), clones, (reap, mc_smoe, hc_smoe), strict=True):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = run(Path(clone))
        commit = Path(clone, ".commit")
        head = (
            commit.read_text()
            if commit.exists()
            else subprocess.check_output(["git", "-C", clone, "rev-parse", "HEAD"], text=True)
        )
        made = {"repository": repository, "commit": head.strip(), "made_by": "tests/surgery/agreement/regenerate.py", **found}
        (HERE / f"{name}.json").write_text(json.dumps(_short(made), indent=None) + "\n")


def _short(value):
    """Numbers to nine digits: float32 holds seven."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1:])
