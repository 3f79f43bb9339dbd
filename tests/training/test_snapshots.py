"""A fine-tuning that is broken off goes on from its snapshot to the very weights and losses of a whole one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moesaic.core.errors import BadInput
from moesaic.training import snapshots
from moesaic.training.finetune import finetune


class Rows:
    """Batches that depend on where the training is, and on nothing else."""

    def rows(self, first, count):
        return torch.randint(0, 9, (count, 5), generator=torch.Generator().manual_seed(first))


class Counting:
    """An objective with a number of its own, and with drawn noise."""

    def __init__(self):
        self.mean = torch.zeros(())

    def loss(self, model, batch):
        far = ((model.weight[batch["text"]] + torch.randn(3) - 1) ** 2).mean()
        self.mean = 0.9 * self.mean + 0.1 * far.detach()
        return far * (1 + self.mean)

    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


class Tiny(nn.Embedding):
    class config:
        @staticmethod
        def get_text_config():
            return None


def train(file, until=None, steps=9):
    torch.manual_seed(3)
    model, own = Tiny(9, 3).to(torch.bfloat16), Counting()

    def after(done):
        if done == until:
            raise KeyboardInterrupt

    losses = finetune(
        model, None, {"text": Rows()}, model.parameters(), objective=own.loss, steps=steps, lr=0.1, batch_size=4, seq_len=5,
        after=after, snapshot=file, state=own,
    )  # fmt: skip
    return model.weight.detach(), losses


def test_a_training_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "EVERY", 0.0)
    weight, losses = train(None)
    for until in (1, 4, 9):
        file = tmp_path / f"{until}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            train(file, until)
        assert file.is_file() == (until > 1)
        again, same = train(file)
        assert same == losses and torch.equal(again, weight) and len(losses) == 9
        done, same = train(file)  # a stage that had ended
        assert same == losses and torch.equal(done, weight)


def test_a_snapshot_of_other_parameters_or_a_broken_one_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    train(file, steps=2)
    model = Tiny(9, 4)
    with pytest.raises(BadInput, match="of other parameters"):
        finetune(
            model, None, {"text": Rows()}, model.parameters(), objective=Counting().loss, steps=1, seq_len=5, snapshot=file
        )
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="broken snapshot"):
        train(file)
