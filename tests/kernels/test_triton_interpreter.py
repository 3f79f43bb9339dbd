"""The Triton programs in Triton's interpreter, on CPU tensors: arithmetic and indexing are checked, speed is not.

The interpreter is switched on by an environment variable before Triton is imported, so the cases run in a process of
their own; this file is also that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = [
    {"T": 1},
    {"T": 63, "E": 3, "K": 2},
    {"T": 20, "E": 64, "K": 4},
    {"T": 130, "E": 3, "K": 2, "D": 40, "I": 70},
    {"T": 33, "K": 1, "D": 65, "I": 17},
    {"routing": "one expert"},
    {"routing": "empty slots"},
    {"routing": "half the experts", "E": 8, "T": 20},
    {"routing": "no pairs"},
    {"how": {"transposed": True}},
]
TOLERANCE = 2e-5


def mend_interpreter() -> None:
    """Triton 3.6's interpreter turns one-element arrays into ints, which NumPy 2.4 refuses: use `.item()` instead."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    mend_interpreter()
    import torch
    from kernel_cases import Case, relative_error

    for number, case in enumerate(CASES):
        want, got = Case(**case).run("reference"), Case(**case).run("triton")
        errors = {name: relative_error(got[name], tensor) for name, tensor in want.items()}
        errors["inference"] = relative_error(Case(**case).run("triton", grad=False)["y"], want["y"])
        again = Case(**case).run("triton") if number == 1 else got
        errors["repeats"] = float(not all(torch.equal(got[name], again[name]) for name in got))
        print(json.dumps(errors), flush=True)


@pytest.fixture(scope="module")
def errors():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed (pip install triton)")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_output_and_gradients_match_the_naive_twin(errors, case):
    for name, error in errors[case].items():
        assert error <= TOLERANCE, name


if __name__ == "__main__":
    main()
