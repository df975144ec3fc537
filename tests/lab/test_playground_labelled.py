"""Modules of the playground that learn from a teacher which is told the labels."""

import argparse
import sys

import pytest
import torch
from emoji_people import small_data

from emma_core import load_connector, load_module
from emma_core.playground import PLAYGROUND_DIR, load_unet
from emma_core.training.student import tokens_of_texts
from lab.emoji.people import TONES
from lab.playground import RECIPES, labelled, timed_run
from lab.playground.labelled import Labelled, load_labelled, number_of
from lab.playground.training_data import write_training_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A teacher after a few updates."""
    folder = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "load", lambda path: small_data())
        patch.setattr(labelled, "BATCH", 4)
        options = argparse.Namespace(data=folder, out=folder / "teacher.pt", playground=PLAYGROUND_DIR, minutes=0.05, rate=1e-3,
                                     threads=1, seed=0)
        labelled.train(options)
    return options.out


def test_the_teacher_learns_and_reads_its_labels(checkpoint):
    teacher = load_labelled(checkpoint)
    assert torch.load(checkpoint, weights_only=True)["step"] > 0
    assert not torch.equal(teacher.unet.conv_in.weight, load_unet().conv_in.weight)
    generator = torch.Generator().manual_seed(0)
    noised, context = torch.randn(2, 4, 4, 4, generator=generator), torch.randn(2, 16, 128, generator=generator)
    told = {"style": torch.tensor([0, 4]), "face": torch.tensor([5, 5])}
    predicted = [teacher(noised, torch.tensor([700, 700]), context, {**told, "style": torch.tensor(numbers)})
                 for numbers in ([0, 4], [1, 4])]
    assert not torch.equal(predicted[0][0], predicted[1][0]) and torch.equal(predicted[0][1], predicted[1][1])


def test_labels_have_numbers_and_one_more_for_untold():
    assert [number_of("face", tone) for tone in TONES.values()] == [0, 1, 2, 3, 4]
    assert number_of("face", None) == 5 and number_of("style", None) == 4


def test_tokens_of_texts_of_several_lengths_are_those_of_each_alone():
    connector = load_connector(PLAYGROUND_DIR / "ella.safetensors")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(1, length, 128, generator=generator) for length in (5, 3, 5, 4)]
    timestep = torch.tensor([10, 500, 700, 900])
    wanted = torch.cat([connector.tokens(text, timestep[index:index + 1]) for index, text in enumerate(texts)])
    torch.testing.assert_close(tokens_of_texts(connector, texts, timestep), wanted, rtol=1e-4, atol=1e-5)


class Echo(torch.nn.Module):
    """A teacher that answers with what it is told."""

    def forward(self, noised, timestep, context, told):
        return torch.stack([told["style"], told["face"]], dim=1).float()


@pytest.mark.parametrize(("kind", "wanted"), [("style", [[1, 5], [4, 5]]), ("face", [[4, 1], [4, 5]])])
def test_the_teacher_is_told_the_label_of_rows_with_a_reference_only(kind, wanted):
    def group(index):
        return {"style": "twemoji", "face": "medium-light"}[kind]

    rows = [labelled.BatchRow(0, False, "man cook", 7, 0, strength) for strength in (1.0, 0.0)]
    assert labelled.label_target(Echo(), {kind: group}).predict(None, None, None, rows).tolist() == wanted
    untold = torch.tensor([[4.0, 5.0], [4.0, 5.0]])
    found = labelled.label_target(Echo(), {kind: group}, guidance=2.0).predict(None, None, None, rows)
    torch.testing.assert_close(found, untold + 2 * (torch.tensor(wanted) - untold))


@pytest.mark.parametrize("condition", ["style", "object"])
def test_a_module_learns_from_the_teacher(checkpoint, tmp_path, condition, monkeypatch):
    write_training_data(small_data(), tmp_path)
    recipe = RECIPES / f"{condition}.toml"
    monkeypatch.setattr(sys, "argv", [
        "labelled", "distil", condition, str(recipe), "--teacher", str(checkpoint), "--data.jsonl",
        str(tmp_path / f"{condition}.jsonl"), "--data.resolution_px", "32", "--data.bucket_step_px", "8", "--train.steps", "3",
        "--train.batch", "8", "--train.precision", "fp32", "--train.warmup", "0", "--train.average", "0", "--output.folder",
        str(tmp_path / "run"), "--output.thumbnail", "false"])
    labelled.main()
    module = load_module(tmp_path / "run" / f"emma-{condition}.safetensors")
    assert module.config.training["recipe"]["teacher"].startswith("the base")
    assert module.config.condition == condition and max(abs(block.attn_gate.item()) for block in module.blocks) > 0


def test_an_average_is_loaded_from_a_checkpoint(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    teacher = timed_run.averaged(Labelled(load_unet()), checkpoint)
    assert torch.equal(teacher.unet.conv_out.weight, state["average"]["unet.conv_out.weight"])
    assert not torch.equal(teacher.unet.conv_out.weight, state["base"]["unet.conv_out.weight"])
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
