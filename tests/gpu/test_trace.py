"""Recording and calibrating on a CUDA device give what they give on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moesaic
from moesaic.core.documents import Document
from moesaic.trace.calibration import calibrate

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("options", [{}, {"logits": True, "lookahead": 1, "hidden": 0.5}])
def test_recording_in_forward_and_generate(tiny_moe, options):
    found = []
    ids = torch.randint(1, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for device in ("cpu", "cuda"):
        model = moesaic.load(tiny_moe, dtype="float32", device=device).model
        with moesaic.trace(model, **options) as recorder:
            model(input_ids=ids.to(device), attention_mask=mask.to(device))
            model.generate(ids.to(device), attention_mask=mask.to(device), max_new_tokens=5, min_new_tokens=5, do_sample=False)
        found.append(recorder.result)
    one, two = found
    assert one.lengths_S.tolist() == two.lengths_S.tolist()
    assert (one.experts_TLK == two.experts_TLK).mean() > 0.98  # near ties may turn with the order of a sum
    assert np.array_equal(one.runs_N4, two.runs_N4)
    assert one.columns.keys() == two.columns.keys()


def test_calibration(tiny_moe, tmp_path):
    documents = [Document("The router scores every expert for every token. " * 4, "prose")]
    sums = []
    for device in ("cpu", "cuda"):
        loaded = moesaic.load(tiny_moe, dtype="float32", device=device)
        found = calibrate(loaded, documents, tmp_path / device, tiers="R0,R1,R2,A1,B", context=32)
        sums.append(found.layer(1).sums)
    for name, tensor in sums[0].items():
        assert torch.allclose(tensor, sums[1][name], rtol=1e-2, atol=1e-3), name
