"""What ends a run early: bad numbers, errors, interrupts, full disks, and folders of other runs."""

import dataclasses
import errno
import math
import os
import signal
import warnings
from contextlib import contextmanager
from operator import attrgetter

import pytest
import torch
from small_models import small_connector
from training_world import TinyDenoiser, TinySet, same, tiny_config, tiny_trainer, weights

from emma_core import load_module
from emma_core.errors import EmmaWarning, TrainingError
from emma_core.training import checkpoints as checkpoint_files
from emma_core.training.checkpoints import checkpoints, load_checkpoint
from emma_core.training.log import Log


def full(state, path):
    """In place of `torch.save`."""
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


class Failing(TinyDenoiser):
    """Its fourth call gives NaN in the second row, or raises."""

    def __init__(self, error: BaseException | None = None):
        super().__init__(small_connector().width)
        self.error, self.calls = error, 0

    def predict_noise(self, noised_B4hw, timestep_B, context_BKW):
        self.calls += 1
        if self.calls == 4 and self.error:
            raise self.error
        predicted = super().predict_noise(noised_B4hw, timestep_B, context_BKW)
        return predicted * torch.tensor([1.0, torch.nan, 1.0, 1.0])[:, None, None, None] if self.calls == 4 else predicted


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    config = tiny_config()
    trainer = tiny_trainer(tmp_path, config, denoiser=Failing())
    states = []
    with pytest.raises(TrainingError, match=r"the loss of batch 4 is not finite \(picture \d, timestep \d+, caption '.*bf16"):
        trainer.run(lambda progress: states.append(weights(trainer)))
    assert trainer.step == 3 and same(states[-1], weights(trainer))
    assert load_checkpoint(checkpoints(tmp_path)[-1])["step"] == 3
    healthy, resumed = tiny_trainer(tmp_path / "healthy", config), tiny_trainer(tmp_path, config)
    healthy.run()
    resumed.resume()
    resumed.run()
    assert same(weights(healthy), weights(resumed)), "the bad batch is drawn again"


class Broken(TinyDenoiser):
    """From the fourth batch on, the weights of the rows or the gradients break: the errors of the rows stay finite."""

    def __init__(self, stage: str):
        super().__init__(small_connector().width)
        self.stage, self.calls = stage, 0

    def predict_noise(self, noised_B4hw, timestep_B, context_BKW):
        self.calls += 1
        predicted_B4hw = super().predict_noise(noised_B4hw, timestep_B, context_BKW)
        if self.stage == "weight" and self.calls == 3:
            self.alphas_cumprod_T.zero_()  # no signal left: 1/SNR without a bound is infinite
        elif self.stage == "gradient" and self.calls == 4:
            predicted_B4hw.register_hook(lambda gradient: gradient * torch.inf)
        return predicted_B4hw


@pytest.mark.parametrize(("stage", "found"), [
    ("weight", r"the loss of batch 4 is not finite \(picture \d, .*, error \d.*, weight inf"),
    ("gradient", r"the gradient of update 4 is not finite \(its norm is (nan|inf)\)"),
])
def test_nothing_that_is_not_finite_reaches_the_weights_or_the_disk(tmp_path, stage, found):
    config = tiny_config(report__save_every=2)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, inverse_snr=math.inf))
    trainer = tiny_trainer(tmp_path, config, denoiser=Broken(stage))
    states = []
    with pytest.raises(TrainingError, match=found + ".*Nothing was changed by it; the last state is saved"):
        trainer.run(lambda progress: states.append(weights(trainer)))
    assert trainer.step == 3 and same(states[-1], weights(trainer))
    saved = load_checkpoint(checkpoints(tmp_path)[-1])
    assert saved["step"] == 3 and same(saved["learning"], states[-1])
    assert load_module(tmp_path / "emma-module.safetensors").config.training["steps"] == 3


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_config(report__save_every=2))

    def break_weights(progress):
        if progress.step == 3:
            trainer.student.module.blocks[1].attn_gate.data.fill_(torch.nan)

    with pytest.warns(EmmaWarning, match=r"could not be saved: after update 3 the state holds NaN .*blocks.1.attn_gate"), \
            pytest.raises(TrainingError, match="the loss of batch 4 is not finite"):
        trainer.run(break_weights)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002.pt"]
    assert load_module(tmp_path / "emma-module.safetensors").config.training["steps"] == 2


def test_the_first_error_is_the_one_that_is_told(tmp_path, monkeypatch):
    class OutOfMemory(RuntimeError):
        pass

    trainer = tiny_trainer(tmp_path, tiny_config(), denoiser=Failing(OutOfMemory("9 GB more")))
    monkeypatch.setattr(checkpoint_files.torch, "save", full)
    with pytest.warns(EmmaWarning, match="the state before the error could not be saved: .* the disk is full"), \
            pytest.raises(OutOfMemory, match="9 GB more"):
        trainer.run()


def test_an_interrupted_run_that_cannot_be_saved_says_so(tmp_path, monkeypatch):
    def interrupt(progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.torch, "save", full)
    with pytest.raises(TrainingError, match="the disk is full"):
        tiny_trainer(tmp_path, tiny_config()).run(interrupt)


def test_an_interrupt_in_the_middle_of_an_update_is_gone_on_from_bit_for_bit(tmp_path):
    config = tiny_config(train__accumulate=2)
    whole, first = tiny_trainer(tmp_path / "whole", config), tiny_trainer(tmp_path / "parts", config,
                                                                          denoiser=Failing(KeyboardInterrupt()))
    whole.run()
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = tiny_trainer(tmp_path / "parts", config)
    assert second.resume() and second.step == 1
    second.run()
    assert same(weights(whole), weights(second))


@pytest.mark.parametrize("place", ["optimizer.step", "optimizer.zero_grad", "average.update", "draws.draw",
                                   "student.denoiser.predict_noise"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_anywhere_in_an_update_is_taken_after_it(tmp_path, whole_run, place, number, times, capfd):
    """Whether at the beginning of a part or at its end, once or twice: the run goes on bit for bit."""
    config, wanted = whole_run
    first = tiny_trainer(tmp_path, config)
    owner, _, name = place.rpartition(".")
    part, calls = attrgetter(owner)(first), []
    original = getattr(part, name)

    def signalled(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(part, name, signalled)
    before = signal.getsignal(number)
    with ending_signals(), pytest.raises(KeyboardInterrupt):
        first.run()
    assert signal.getsignal(number) is before
    assert 0 < first.step < 8 and load_checkpoint(checkpoints(tmp_path)[-1])["step"] == first.step
    assert ("this update is finished" in capfd.readouterr().err) and not first._torn
    second = tiny_trainer(tmp_path, config)
    assert second.resume() and second.draws.number == 2 * second.step
    second.run()
    assert same(weights(second), wanted)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    config = tiny_config(train__accumulate=2, train__average=0.9)
    trainer = tiny_trainer(tmp_path_factory.mktemp("whole"), config)
    trainer.run()
    return config, weights(trainer)


@contextmanager
def ending_signals():
    """As on the command line, where SIGTERM ends like Ctrl-C: a signal that a run doesn't take must not end the tests."""
    def stop(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path, whole_run, monkeypatch):
    config, wanted = whole_run
    write = checkpoint_files.torch.save

    def signalled(state, path):
        os.kill(os.getpid(), signal.SIGINT)
        write(state, path)

    first = tiny_trainer(tmp_path, dataclasses.replace(config, report=dataclasses.replace(config.report, save_every=3)))
    monkeypatch.setattr(checkpoint_files.torch, "save", signalled)
    with ending_signals(), pytest.raises(KeyboardInterrupt):
        first.run()
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000003.pt"]
    second = tiny_trainer(tmp_path, config)
    second.resume()
    second.run()
    assert same(weights(second), wanted)


def test_the_third_signal_leaves_at_once_and_saves_nothing(tmp_path, capfd):
    trainer = tiny_trainer(tmp_path, tiny_config())
    step = trainer.optimizer.step

    def signalled():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        step()

    trainer.optimizer.step = signalled
    with ending_signals(), pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not list(tmp_path.iterdir())
    assert "once more leaves without, and what was learnt since the last checkpoint is lost" in capfd.readouterr().err


def test_an_error_inside_the_change_of_weights_is_never_saved(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, tiny_config(train__average=0.9))
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")

    monkeypatch.setattr(trainer.average, "update", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        trainer.run()
    assert not checkpoints(tmp_path)


class Recaptioned(TinySet):
    def captions(self, index):
        return ("another caption",)


@pytest.mark.parametrize(("data", "told"), [
    (TinySet(5), "6 pictures then, 5 now"), (TinySet(9), "6 pictures then, 9 now"), (TinySet(1), "6 pictures then, 1 now"),
    (Recaptioned(), "6 pictures as before, but with other captions, or in another order")])
def test_data_that_changed_between_sittings_are_told_and_gone_on_with(tmp_path, data, told):
    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    second = tiny_trainer(tmp_path, tiny_config(), data)
    with pytest.warns(EmmaWarning, match=f"not those of the sitting before: {told}"):
        assert second.resume()
    second.run()
    assert second.step == 8


def test_the_same_data_in_another_place_are_gone_on_with(tmp_path):
    tiny_trainer(tmp_path, tiny_config(train__steps=1, data__folder="/before/pictures")).run()
    moved = tiny_config(data__folder="pictures")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmmaWarning)
        assert tiny_trainer(tmp_path, moved).resume()
    with pytest.raises(TrainingError, match="data.folder is '/before/pictures' there and 'pictures' here, and the data differ"):
        tiny_trainer(tmp_path, moved, TinySet(5)).resume()


def test_data_that_are_the_same_are_gone_on_with_silently(tmp_path):
    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", EmmaWarning)
        assert tiny_trainer(tmp_path, tiny_config()).resume()


def test_fewer_data_than_a_checkpoint_of_before_drew_from_are_told(tmp_path):
    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    path = checkpoints(tmp_path)[-1]
    state = load_checkpoint(path)
    del state["draws"]["targets"]
    torch.save(state, path)
    with pytest.warns(EmmaWarning, match="6 pictures or more then, 2 now"):
        tiny_trainer(tmp_path, tiny_config(), TinySet(2)).resume()


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    tiny_trainer(tmp_path, tiny_config()).run()
    changed = tiny_trainer(tmp_path, tiny_config(train__rate=1e-3, objective__drop_text=0.5))
    with pytest.raises(TrainingError, match="drop_text is 0.05 there and 0.5 here; train.rate is 0.01 .*. Give this run"):
        changed.resume()
    longer = tiny_trainer(tmp_path, tiny_config(train__steps=12, report__save_every=5))
    assert longer.resume() and longer.step == 8


def test_a_checkpoint_that_lacks_newer_settings_is_gone_on_from(tmp_path):
    tiny_trainer(tmp_path, tiny_config(train__steps=2)).run()
    path = checkpoints(tmp_path)[-1]
    state = load_checkpoint(path)
    del state["run"]["objective.place_weight"], state["run"]["train.rate"]
    torch.save(state, path)
    with pytest.raises(TrainingError, match="other settings: train.rate is 0.0001 there and 0.01 here. Give"):
        tiny_trainer(tmp_path, tiny_config()).resume()


def test_the_last_checkpoints_are_kept(tmp_path):
    tiny_trainer(tmp_path, tiny_config(report__save_every=2, report__keep=2)).run()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000006.pt", "checkpoint-00000008.pt"]
    assert not list(tmp_path.glob("*.part"))


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with the checkpoints of updates 2 and 4, the bytes of the newer one, and the run's settings."""
    folder, config = tmp_path_factory.mktemp("run"), tiny_config(train__steps=4, report__save_every=2)
    tiny_trainer(folder, config).run()
    return folder, checkpoints(folder)[-1].read_bytes(), config


def cut_short(content):
    return content[:1000]


def flipped_at(place: float):
    def flipped(content):
        at = int(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]
    return flipped


@pytest.mark.parametrize("damage", [cut_short, *(flipped_at(index / 24) for index in range(25))])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(two_checkpoints, damage):
    folder, content, config = two_checkpoints
    checkpoints(folder)[-1].write_bytes(damage(content))
    with pytest.raises(TrainingError, match="checkpoint-00000004.pt cannot be read.*Remove it: the run then goes on from "
                                            "checkpoint-00000002.pt, the one before it, which is whole"):
        tiny_trainer(folder, config).resume()


def test_without_a_whole_checkpoint_the_run_begins_anew(two_checkpoints, tmp_path):
    _, content, config = two_checkpoints
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step:08d}.pt").write_bytes(flipped_at(0.5)(content))
    with pytest.raises(TrainingError, match="Remove it: there is no whole one before it"):
        tiny_trainer(tmp_path, config).resume()


@pytest.mark.parametrize("state", [[1, 2], {"format_version": 1, "step": 3}, {"format_version": 1, "step": "3"}])
def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint-00000003.pt")
    with pytest.raises(TrainingError, match="checkpoint-00000003.pt cannot be read"):
        tiny_trainer(tmp_path, tiny_config()).resume()


def test_checkpoints_reach_the_disk_before_their_name_does(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda opened: (events.append(os.fstat(opened).st_ino), fsync(opened)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(str(new)), replace(old, new)))
    tiny_trainer(tmp_path, tiny_config(train__steps=1)).run()
    path = checkpoints(tmp_path)[-1]
    named = events.index(str(path))
    assert events[named - 1] == path.stat().st_ino and events[named + 1] == tmp_path.stat().st_ino


@pytest.mark.skipif(os.name == "nt", reason="limits of a process are Unix's")
def test_a_disk_that_takes_no_more_is_told_whatever_torch_says(tmp_path):
    import resource

    trainer, before = tiny_trainer(tmp_path, tiny_config(train__steps=1)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(TrainingError, match="checkpoint-00000001.pt could not be written: File too large. Nothing was"):
            trainer.run()
        with pytest.raises(TrainingError, match="emma-module.safetensors could not be written: File too large"):
            trainer.save_result()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    tiny_trainer(tmp_path, tiny_config(train__steps=3)).run()
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    monkeypatch.setattr(checkpoint_files.torch, "save", full)
    trainer = tiny_trainer(tmp_path, tiny_config())
    trainer.resume()
    with pytest.raises(TrainingError, match="the disk is full. Nothing was lost"):
        trainer.run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_place_of_a_runs_file_is_refused_at_once(tmp_path):
    """Reading it would wait for ever."""
    path, log = tmp_path / "checkpoint-00000001.pt", tmp_path / "log.jsonl"
    for pipe in (path, log):
        os.mkfifo(pipe)
    with pytest.raises(TrainingError, match="is a named pipe; wanted a checkpoint of a training run"):
        load_checkpoint(path)
    with pytest.raises(TrainingError, match="is a named pipe; wanted the log of a training run"):
        Log(log).read()
