"""What Train EMMA Module tells before its first update: memory by tensors without numbers, disk, and then the time."""

from __future__ import annotations

import logging
import types
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from model_families import FAMILIES
from tiny_models import TEXT_DIM, WIDTH, noise

CPU = torch.device("cpu")


class Many(list):
    """Several values on one input, as a list output of another node gives them."""


@pytest.fixture(scope="module")
def encoder(pack_import):
    return pack_import("host.encoders").load_playground_reference_encoder()


@pytest.fixture
def shown(pack_import, monkeypatch):
    """The texts of the node, in order; None stands for each update."""
    found = []
    monkeypatch.setattr(pack_import("host.foretelling"), "show_on_node", lambda text, node: found.append(text))
    trainer = pack_import("emma_core.training.trainer").Trainer
    update = trainer.update
    monkeypatch.setattr(trainer, "update", lambda self, buckets: found.append(None) or update(self, buckets))
    return found


@pytest.fixture
def train(run_node, tiny, encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def run(**changes):
        settings = {
            "model": tiny.model(), "ella": tiny.ella(), "latents": {"samples": noise((2, 4, 8, 8), 31)},
            "positive": [[noise((1, 5, TEXT_DIM), 40), {}]], "reference_image": noise((2, 64, 64, 3), 32).sigmoid(),
            "encoder": encoder, "name": "run", "condition": "style", "steps": 3, "batch": 2, "accumulate": 2, "rate": 1e-3,
            "gate_rate": 5.0, "seed": 3, "precision": "fp32", "timestep_power": 1.0, "inverse_snr": 0.0, "average": 0.9,
            "checkpoint_every": 100, **changes,
        }
        settings = {key: value if isinstance(value, Many) else [value] for key, value in settings.items()}
        return run_node("EMMATrainModule", **{key: list(value) for key, value in settings.items()})

    return run


class Computed(BaseException):
    """Ends a run when its memory is known; no error, as those are told and trained past."""


@pytest.fixture
def needs(train, pack_import, monkeypatch):
    """`needs(...)`: what the node computes before the first update of such a run."""
    foretelling, found = pack_import("host.foretelling"), []
    real = foretelling.needed

    def computed(*which):
        found.append(real(*which))
        raise Computed

    def run(**changes):
        monkeypatch.setattr(foretelling, "needed", computed)
        with pytest.raises(Computed):
            train(**changes)
        return found[-1]

    return run


def test_what_the_run_needs_is_shown_before_its_first_update_and_the_time_with_it(train, shown, caplog):
    caplog.set_level(logging.INFO)
    _, _, report = train()
    before = shown[:shown.index(None)]
    assert [line.split(":")[0] for line in before[-1].splitlines()] == ["3 updates of 4 pictures, of 2 there are", "disk",
                                                                        "memory"]
    [first] = shown[shown.index(None) + 1:shown.index(None) + 2]
    assert first.startswith(before[-1]) and "update 1 of 3, loss" in first.splitlines()[-1]
    assert shown[-1] == report
    assert all(any(line in message for message in caplog.messages) for line in first.splitlines())


def test_memory_that_the_card_has_not_is_warned_of_before_the_first_update(train, shown, caplog, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *which: 10_000_000)
    train()
    [line] = [line for line in shown[shown.index(None) - 1].splitlines() if line.startswith("memory")]
    assert "this machine has 0.0 GB, which is not enough. Halve batch and double accumulate" in line
    assert any(record.levelno == logging.WARNING and line in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["ella", *sorted(FAMILIES)])
def test_memory_of_every_family_is_computed(needs, tiny, name):
    given = {}
    if name != "ella":
        family = FAMILIES[name]
        given = {"model": family.patcher(tiny.patcher_for), "ella": None, "positive": family.conditioning(40),
                 "latents": {"samples": noise(family.latent(2)["samples"].shape, 31)}}
    found = needs(**given)
    assert 0 < found.begun < found.peak


def test_more_and_larger_pictures_need_more_memory(needs):
    found = [needs(name=f"{batch} of {side}", batch=batch, latents={"samples": noise((2, 4, side, side), 31)})
             for batch, side in ((1, 32), (4, 32), (1, 64))]
    assert found[0].begun == found[1].begun == found[2].begun
    assert found[0].peak < min(found[1].peak, found[2].peak)


def test_the_weights_are_those_of_the_copies_that_train(needs, pack_import, monkeypatch):
    beginning, made = pack_import("emma_core.training.beginning"), []
    real = beginning.Trainer
    monkeypatch.setattr(beginning, "Trainer", lambda *parts: made.append(real(*parts)) or made[-1])
    found = needs(average=0.9)
    student = made[0].student
    module = [value for value in student.module.parameters()]
    parts = [*student.denoiser.network.parameters(), *student.connector.parameters(), *module, *module]  # and their average
    assert found.begun == pytest.approx(sum(value.nbytes for value in parts), rel=0.01)


def test_a_second_model_that_teaches_is_counted(needs, tiny):
    teacher = tiny.model(seed=8)
    plain = needs()
    taught = needs(name="taught", teacher_model=teacher, teacher_positive=[[noise((1, 5, WIDTH), 60), {}]])
    weights = sum(value.nbytes for value in teacher.model.diffusion_model.state_dict().values())
    assert taught.begun - plain.begun == pytest.approx(weights, rel=0.01)


def test_a_copy_without_numbers_leaves_the_network_as_it_is(tiny, pack_import):
    for checkpointing in (False, True):
        denoiser = pack_import("host.denoiser").HostDenoiser(tiny.model(), CPU, torch.float32, checkpointing)
        seen = noise((1, 4, 8, 8), 6), torch.tensor([400]), noise((1, 8, WIDTH), 5)
        before = denoiser.predict_noise(*seen)
        copy = denoiser.without_numbers(torch.bfloat16)
        assert all(value.is_meta for value in copy.network.state_dict().values())
        assert copy.predict_noise(*(one.to("meta") for one in seen)).is_meta
        assert torch.equal(denoiser.predict_noise(*seen), before)


def test_a_model_that_cannot_be_computed_so_trains_all_the_same(train, shown, pack_import, monkeypatch):
    def fails(*which):
        raise RuntimeError("a patch looked at a number")

    monkeypatch.setattr(pack_import("host.foretelling"), "needed", fails)
    assert len(train()[1]["loss"]) == 3
    assert "memory: not known" in shown[0 if None not in shown else shown.index(None) - 1]


def test_a_disk_without_room_is_refused_before_anything_is_encoded(train, pack_import, encoder, monkeypatch, tmp_path):
    monkeypatch.setattr(encoder.encoder, "encode", lambda *pictures: pytest.fail("a reference was encoded"))
    sizes = pack_import("emma_core.training.sizes")
    monkeypatch.setattr(sizes, "shutil", types.SimpleNamespace(disk_usage=lambda path: types.SimpleNamespace(free=10_000)))
    error = pack_import("emma_core.errors").TrainingError
    for given in ({}, {"ella": None, "positive": [[noise((1, 5, WIDTH), 60), {}]]}):
        with pytest.raises(error, match=r"cache and checkpoints need about .* GB, .* has 0.0 GB free. Make room"):
            train(**given)
    assert not Path(tmp_path / "emma_training").exists()
