"""Our architectures are known to transformers' auto classes, whichever is imported first, and nothing loads before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TINY = 'dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, experts=2, router="top_p")'
BUILD = f"AutoModelForCausalLM.from_config(AutoConfig.for_model('moesaic', **{TINY}))"


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def known(imports):
    code = f"{imports}\nimport transformers.models.auto.modeling_auto as m"
    return python(f"{code}\nprint(type({BUILD}).__name__, type(m.__loader__).__name__)").split()


@pytest.mark.parametrize(
    "imports",
    [
        "import moesaic; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import moesaic",
    ],
)
def test_known_whichever_comes_first_and_transformers_keeps_its_loaders(imports):
    assert known(imports) == ["MoesaicForCausalLM", "SourceFileLoader"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoConfig; import moesaic; from transformers import AutoModelForCausalLM",
        "import moesaic, transformers.modeling_layers; from transformers import AutoConfig, AutoModelForCausalLM",
        "import moesaic, transformers.generation.utils; from transformers import AutoConfig, AutoModelForCausalLM",
        "import moesaic; from transformers import Trainer, AutoConfig, AutoModelForCausalLM",
        "import moesaic; from transformers import Qwen3MoeForCausalLM, AutoModelForCausalLM, AutoConfig",
        "import moesaic.models.language.model; from transformers import AutoConfig, AutoModelForCausalLM",
    ],
)
def test_known_in_every_other_order_of_imports(imports):
    assert known(imports) == ["MoesaicForCausalLM", "SourceFileLoader"]


@pytest.mark.slow
def test_without_moesaic_it_is_unknown():
    with pytest.raises(AssertionError, match="moesaic"):
        python(f"from transformers import AutoConfig, AutoModelForCausalLM\n{BUILD}")
