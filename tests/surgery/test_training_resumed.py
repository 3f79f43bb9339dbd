"""A distillation, an unlearning, an edit that was broken off goes on to the bytes of one that was not."""

from __future__ import annotations

import pytest

from moesaic.core.documents import Document
from moesaic.core.errors import BadInput
from moesaic.surgery.trained import Training, run_step
from moesaic.training import snapshots
from moesaic.training.finetune import finetune
from moesaic.view import resolve_model

TEXT, OTHER = "The quick brown fox jumps over the lazy dog. " * 40, "def add(a, b):\n    return a + b\n\n" * 40
TEXTS = {"text": "text", "valid": "other", "forget": "text", "retain": "other"}


def started(folder, family, method, train, **how):
    bundled = resolve_model("bundled")
    named = {"distill": ("text", "valid") if method == "tgeo_kd" else ("text",), "unlearn": ("forget", "retain")}
    texts = {name: [Document(TEXT if TEXTS[name] == "text" else OTHER, "")] for name in named.get(family, ("text",))}
    return run_step(
        bundled, folder / how.pop("out", "out"), family=family, method=method, train=train, texts=texts,
        teacher=bundled if family == "distill" else None, training=Training(steps=6, batch_size=2, seq_len=32, lr=1e-4), **how,
    )  # fmt: skip


def killed(at):
    """The loop, broken off after so many steps of a stage and before its state is kept again."""

    def train(*args, after, **how):
        def tick(done):
            after(done)
            if done == at:
                raise KeyboardInterrupt

        return finetune(*args, after=tick, **how)

    return train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "options"),
    [("distill", "tgeo_kd", {}), ("unlearn", "seuf", {"loss": "rmu", "loss_options": {"retain_weight": 1.0}}),
     ("edit", "evomoe", {"train": "router"})],
)  # fmt: skip
def test_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, family, method, options):
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    whole = started(tmp_path, family, method, finetune, options=options, out="whole", resume=False)
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, family, method, killed(4), options=options, resume=False)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.training").is_dir()
    with pytest.raises(BadInput, match="pass --resume"):
        started(tmp_path, family, method, finetune, options=options, resume=False)
    again = started(tmp_path, family, method, finetune, options=options, resume=True)
    assert again["steps"][0]["last_loss"] == whole["steps"][0]["last_loss"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.training"))


def test_a_run_that_never_trained_leaves_nothing_to_go_on_from(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, "unlearn", "npo", killed(1), options={}, resume=False)
    (folder,) = tmp_path.glob("*.training")
    assert not list(folder.glob("stage-*"))
    with pytest.raises(KeyboardInterrupt):
        started(tmp_path, "unlearn", "npo", killed(1), options={"beta": 0.2}, resume=False)
