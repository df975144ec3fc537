"""TensorBoard's events beside a run's own log: what happens when they cannot be written."""

import errno
import sys
import types

import pytest
from training_world import tiny_config, tiny_trainer

from emma_core.errors import WriteError
from emma_core.training.reports import Reporter


class FullDisk:
    """In SummaryWriter's place: what it is given it writes when it is told to flush."""

    def __init__(self, folder: str):
        pass

    def add_scalar(self, name, value, step):
        pass

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_in_words_and_the_runs_own_log_is_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FullDisk))
    trainer = tiny_trainer(tmp_path, tiny_config(report__tensorboard=True, report__log_every=1))
    reporter = Reporter(trainer.config, trainer)
    with pytest.raises(WriteError, match="tensorboard.*the disk is full"):
        trainer.run(reporter)
    assert [line["step"] for line in reporter.log.read()] == [1]
