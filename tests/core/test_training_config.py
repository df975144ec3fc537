"""Training configurations: presets, files, flags, and what is refused."""

import argparse
import dataclasses

import pytest

from emma_core.commands import train as command
from emma_core.errors import SettingsError, TrainingConfigError
from emma_core.settings import read_toml, sections
from emma_core.training.config import TrainConfig, resolve
from emma_core.training.presets import PRESETS


def parsed(*arguments: str) -> TrainConfig:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.config_of(parser.parse_args(arguments))


def test_defaults_are_the_papers_recipe():
    """Paper, section 4.2."""
    train, objective = resolve({}).train, resolve({}).objective
    assert (train.rate, train.decay, train.warmup, train.clip, train.precision) == (1e-4, 0.01, 1000, 1.0, "fp16")
    assert train.steps == 200_000 and train.schedule == "constant" and train.gate_rate == 1.0
    assert (objective.drop_text, objective.drop_reference, objective.drop_both) == (0.05, 0.05, 0.05)
    assert objective.timestep_power == 1 and not objective.min_snr and not objective.inverse_snr


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_configuration_reads_back_the_same(tmp_path, preset):
    changes = {"output.folder": 'a "quoted" \\ path', "report.sample_prompts": ("a cat", "ein Hund, groß"), "train.rate": 3e-5}
    config = resolve({}, preset, changes)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert resolve(read_toml(tmp_path / "config.toml")) == config


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "small-card"\n[train]\nsteps = 500\nbatch = 3\n[data]\nflip = true\n')
    config = parsed(str(path), "--train.batch", "7", "--report.sample_prompts", "a cat", "a dog", "--data.flip", "false")
    assert (config.train.steps, config.train.batch, config.data.flip) == (500, 7, False)
    assert config.train.gate_rate == PRESETS["small-card"]["train"]["gate_rate"]
    assert config.report.sample_prompts == ("a cat", "a dog") and config.what == "module"
    assert parsed("ella", str(path)).what == "ella" and parsed("--preset", "paper", str(path)).train.gate_rate == 1.0


def test_pictures_have_the_size_that_the_base_knows_if_nothing_is_said():
    assert parsed("--preset", "small-card").data.resolution_px == 128
    assert parsed("--data.resolution_px", "64").data.resolution_px == 64
    assert resolve({"data": {"resolution_px": 96}}).data.resolution_px == 96
    assert parsed("--base.checkpoint", "sd15.safetensors").data.resolution_px == 512


def test_every_key_is_a_flag_with_an_explanation(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.print_help()
    text = capsys.readouterr().out
    for section, kind in sections(TrainConfig).items():
        for entry in dataclasses.fields(kind):
            assert f"--{section}.{entry.name}" in text and len(entry.metadata["help"]) > 10, entry.name


@pytest.mark.parametrize(("given", "found"), [
    ({"train": {"step": 5}}, r"\[train\] has the unknown key 'step'; it knows steps, batch"),
    ({"trains": {}}, "'trains', which is no section; wanted output, data"), ({"train": 5}, "'train', which is no section"),
    ({"train": {"steps": 0}}, "train.steps = 0; wanted 1 to any"), ({"train": {"steps": 1.5}}, "wanted a whole number"),
    ({"train": {"steps": True}}, "wanted a whole number"), ({"train": {"rate": "fast"}}, "wanted a number"),
    ({"train": {"rate": float("nan")}}, "train.rate = nan"), ({"objective": {"drop_text": 1.5}}, "wanted 0 to 1"),
    ({"data": {"flip": 1}}, "wanted true or false"), ({"module": {"condition": "mood"}}, "choose one of style, object"),
    ({"report": {"sample_prompts": "a cat"}}, "wanted a list of texts"), ({"what": "lora"}, "wanted module or ella"),
])
def test_what_is_not_known_is_refused(given, found):
    with pytest.raises(SettingsError, match=found):
        resolve(given)


def test_unknown_presets_and_broken_files_are_refused(tmp_path):
    message = "no preset 'large'; choose one of paper, small-card, distil, sd15-8gb, sdxl-12gb"
    with pytest.raises(TrainingConfigError, match=message):
        resolve({}, "large")
    (tmp_path / "broken.toml").write_text("[train\n")
    with pytest.raises(SettingsError, match="broken.toml is not TOML"):
        read_toml(tmp_path / "broken.toml")
    with pytest.raises(SettingsError, match="none.toml cannot be read"):
        read_toml(tmp_path / "none.toml")


def test_a_configuration_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 7\n")
    assert read_toml(tmp_path / "own.toml") == {"train": {"steps": 7}}


@pytest.mark.parametrize(("content", "told"), [
    ('[data]\nfolder = "C:\\Users\\pictures"\n', "Paths of Windows go between single quotes, 'C:.pictures', or with /"),
    ("a = " + "[" * 5000, "is not TOML"), ("a = " + "9" * 9000, "is not TOML")])
def test_what_toml_does_not_allow_is_told(tmp_path, content, told):
    (tmp_path / "own.toml").write_text(content)
    with pytest.raises(SettingsError, match=told):
        read_toml(tmp_path / "own.toml")
