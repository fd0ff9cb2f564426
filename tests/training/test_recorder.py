"""Recorders of a run: one that is missing is an error, one that fails is said once."""

import sys
import types

import pytest

import config
from config import UserError
from training.recorder import Recorder


def test_a_recorder_that_fails_is_said_once_and_a_missing_one_is_an_error(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        UserError, match="train.log: wandb is not installed; fix: pip install wandb"
    ):
        Recorder("wandb", tmp_path, config.Recipe())
    sent = []

    class Wandb:
        def init(self, **_):
            return self

        def log(self, row, step):
            sent.append((step, row))
            if step == 2:
                raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    recorder = Recorder("wandb", tmp_path, config.Recipe())
    for step in (1, 2, 3):
        recorder.record(step, {"loss": 1.0})
    assert [step for step, _ in sent] == [1, 2]
    assert capsys.readouterr().out.count("no network") == 1
    assert Recorder("none", tmp_path, config.Recipe()).record(1, {}) is None


def test_tensorboard_hides_the_steps_that_a_resumed_run_makes_again(tmp_path, monkeypatch):
    """The folder is the stage's own: what is hidden there are steps of no other stage."""
    opened = []

    class Writer:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            opened.append((name, value, step))

        def flush(self):
            pass

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    recorder = Recorder("tensorboard", tmp_path, config.Recipe(), "finetune", start=4)
    recorder.record(5, {"finetune/loss": 1.0})
    assert opened == [(f"{tmp_path}/tensorboard/finetune", 5), ("finetune/loss", 1.0, 5)]
