"""Files named as in ComfyUI's model folders: found where ComfyUI finds them, refused with every folder named."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from small_t5 import PROMPT, PROMPT_IDS, SIZES, WORDS, save_tokenizer
from transformers import T5Config, T5EncoderModel

from emma_core.__main__ import main
from emma_core.base.config import BaseConfig, EllaConfig, EncodersConfig
from emma_core.base.found_files import found_file, with_found_files
from emma_core.commands.flags import find_files
from emma_core.commands.generate import PictureConfig
from emma_core.errors import SettingsError, TextEncoderFileError
from emma_core.files.comfyui_folders import find_comfyui, open_comfyui
from emma_core.files.module_file import load_module
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text.encoder import load_text_encoder
from emma_core.training.config import TeacherConfig, TrainConfig


@pytest.fixture
def comfyui(tmp_path) -> Path:
    root = tmp_path / "ComfyUI"
    (root / "models").mkdir(parents=True)
    (root / "main.py").touch()
    return root


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_every_setting_that_names_a_file_is_looked_up_in_its_folder(comfyui):
    names = {"checkpoints": "base.safetensors", "vae": "vae.safetensors", "loras": "sub/lora.safetensors",
             "ella": "ella.safetensors", "clip": "t5.safetensors", "clip_vision": "clip.safetensors",
             "ipadapter": "ip.safetensors", "emma": "m.safetensors"}
    paths = {key: str(put(comfyui / "models" / key / name)) for key, name in names.items()}
    config = TrainConfig(
        base=BaseConfig("base.safetensors", "vae.safetensors", lora="sub/lora.safetensors"),
        ella=EllaConfig("ella.safetensors", "t5.safetensors"),
        teacher=TeacherConfig(ip_adapter="ip.safetensors", ip_image_encoder="clip.safetensors"))
    found = with_found_files(config, open_comfyui(comfyui))
    assert (found.base.checkpoint, found.base.vae, found.base.lora) == (paths["checkpoints"], paths["vae"], paths["loras"])
    assert (found.ella.file, found.ella.text_encoder) == (paths["ella"], paths["clip"])
    assert (found.teacher.ip_adapter, found.teacher.ip_image_encoder) == (paths["ipadapter"], paths["clip_vision"])
    pictures = with_found_files(PictureConfig(encoder=EncodersConfig(("clip.safetensors",))), open_comfyui(comfyui))
    assert pictures.encoder.files == (paths["clip_vision"],) and pictures.base.checkpoint == "playground"
    assert found_file("--module", "m.safetensors", ("emma",), open_comfyui(comfyui)) == paths["emma"]


def test_paths_win_over_names_and_nothing_changes_without_a_comfyui(comfyui, tmp_path, monkeypatch):
    put(comfyui / "models" / "loras" / "here.safetensors")
    put(tmp_path / "here.safetensors")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(base=BaseConfig(lora="here.safetensors"))
    assert with_found_files(config, open_comfyui(comfyui)) == config == with_found_files(config, None)


def test_extra_model_paths_are_honoured(comfyui, tmp_path, monkeypatch):
    """Base paths (relative, with ~ and variables), several sections, several lines, old keys, and defaults first."""
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    put(comfyui / "extra_model_paths.yaml", """
a111:
    base_path: ../webui
    checkpoints: models/Stable-diffusion
    loras: |
        models/Lora
        models/LyCORIS
mine:
    base_path: ${STORE}
    is_default: true
    clip: t5
    checkpoints: best
    custom_nodes: nodes
empty:
absolute:
    ella: %s
""" % (tmp_path / "far"))
    folders = open_comfyui(comfyui)
    webui = tmp_path / "webui" / "models"
    assert folders.folders("checkpoints") == [tmp_path / "store" / "best", comfyui / "models" / "checkpoints",
                                              webui / "Stable-diffusion"]
    assert folders.folders("loras") == [comfyui / "models" / "loras", webui / "Lora", webui / "LyCORIS"]
    assert folders.folders("text_encoders") == [tmp_path / "store" / "t5", comfyui / "models" / "text_encoders",
                                                comfyui / "models" / "clip"]
    wanted = put(webui / "LyCORIS" / "one.safetensors")
    assert folders.find("one.safetensors", ("loras",)) == wanted
    assert folders.find("two.safetensors", ("ella",)) is None
    assert folders.find("two.safetensors", ("loras", "ella")) is None
    assert folders.find(put(tmp_path / "far" / "two.safetensors").name, ("ella",)) is not None


def test_no_name_leads_out_of_the_folders(comfyui):
    put(comfyui / "models" / "secret.safetensors")
    assert open_comfyui(comfyui).find("../secret.safetensors", ("loras",)) is None


@pytest.mark.parametrize(("text", "message"), [
    ("a: [", "is not YAML"), ("- 1", "wanted sections"), ("a: 5", "the section a holds 5"),
    ("x: &x [*x]\na: *x", "the section x holds"), ("a: 2001-99-99", "is not YAML"),
    ("a:\n  base_path: [a]", r"base_path = \['a'\]; wanted a folder"), ("#" * 100_000, "holds 100,000 bytes")])
def test_damaged_extra_model_paths_are_refused(comfyui, text, message):
    put(comfyui / "extra_model_paths.yaml", text)
    with pytest.raises(SettingsError, match=message):
        open_comfyui(comfyui)


def test_a_missing_name_is_refused_with_every_folder(comfyui):
    with pytest.raises(SettingsError) as refusal:
        with_found_files(TrainConfig(ella=EllaConfig(text_encoder="no.safetensors")), open_comfyui(comfyui))
    for part in ("ella.text_encoder = 'no.safetensors'", "models/text_encoders", "models/clip", "models/ella_encoder"):
        assert part in str(refusal.value).replace(os.sep, "/")


def test_the_comfyui_is_the_named_one_else_that_of_the_environment_else_that_around_the_pack(comfyui, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    around = tmp_path / "around"
    put(around / "main.py")
    (around / "models").mkdir()
    pack = around / "custom_nodes" / "pack"
    assert find_comfyui(str(comfyui), pack).root == comfyui
    assert find_comfyui("", pack).root == around and find_comfyui("", tmp_path / "alone") is None
    monkeypatch.setenv("COMFYUI_PATH", f"{comfyui}{os.pathsep}elsewhere")
    assert find_comfyui("", pack).root == comfyui
    with pytest.raises(SettingsError, match="holds no ComfyUI"):
        find_comfyui(str(tmp_path), pack)


def single_t5(folder: Path, **sizes) -> Path:
    """flan-t5-xl.safetensors in small, with the standard vocabulary and no tokenizer."""
    config = T5Config(**{**SIZES, "vocab_size": 32128, **sizes}, feed_forward_proj="gated-gelu")
    state = {key: value for key, value in T5EncoderModel(config).state_dict().items() if key != "encoder.embed_tokens.weight"}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "flan-t5-xl.safetensors")
    return folder / "flan-t5-xl.safetensors"


@pytest.fixture
def with_tokenizer(comfyui) -> Path:
    (comfyui / "comfy" / "text_encoders" / "t5_tokenizer").mkdir(parents=True)
    save_tokenizer(comfyui / "comfy" / "text_encoders" / "t5_tokenizer" / "tokenizer.json")
    return comfyui


def test_a_single_t5_file_gets_its_tokenizer_from_comfyui(with_tokenizer):
    file = single_t5(with_tokenizer / "models" / "text_encoders")
    found = with_found_files(TrainConfig(ella=EllaConfig(text_encoder=file.name)), open_comfyui(with_tokenizer)).ella
    assert Path(found.tokenizer).is_relative_to(with_tokenizer / "comfy")
    assert load_text_encoder(found.text_encoder, tokenizer=found.tokenizer).tokenizer.ids(PROMPT) == PROMPT_IDS
    for message in ("--comfyui DIR", "--ella.tokenizer", "flan-t5-xl.tokenizer.json"):
        with pytest.raises(TextEncoderFileError, match=message):
            load_text_encoder(file)


def test_a_tokenizer_in_a_folder_of_the_files_name_is_its_own_and_a_named_one_wins(with_tokenizer, tmp_path):
    file = single_t5(tmp_path)
    (tmp_path / "flan-t5-xl").mkdir()
    save_tokenizer(tmp_path / "flan-t5-xl" / "tokenizer.json", [*WORDS[:3], *reversed(WORDS[3:])])
    own = load_text_encoder(file).tokenizer.ids(PROMPT)
    assert own != PROMPT_IDS and sorted(own) != [2] * len(own)
    section = EllaConfig(text_encoder=str(file))
    assert with_found_files(TrainConfig(ella=section), open_comfyui(with_tokenizer)).ella == section
    save_tokenizer(tmp_path / "named.json")
    assert load_text_encoder(file, tokenizer=tmp_path / "named.json").tokenizer.ids(PROMPT) == PROMPT_IDS


def test_the_standard_tokenizer_is_not_given_to_another_vocabulary(with_tokenizer, tmp_path):
    section = EllaConfig(text_encoder=str(single_t5(tmp_path, vocab_size=40)))
    assert with_found_files(TrainConfig(ella=section), open_comfyui(with_tokenizer)).ella.tokenizer == ""


@pytest.fixture
def playground_in(with_tokenizer) -> Path:
    """The playground's files under their names in a ComfyUI's folders."""
    for folder, name in (("emma", "emma-style.safetensors"), ("ella", "ella.safetensors"), ("text_encoders", "t5.safetensors")):
        (with_tokenizer / "models" / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(PLAYGROUND_DIR / name, with_tokenizer / "models" / folder / f"in-comfyui-{name}")
    shutil.copy(PLAYGROUND_DIR / "tokenizer.json", with_tokenizer / "models" / "text_encoders")
    return with_tokenizer


def test_inspect_card_and_calibrate_take_names_as_in_comfyui(playground_in, tmp_path, capsys):
    module = playground_in / "models" / "emma" / "in-comfyui-emma-style.safetensors"
    where = ["--comfyui", str(playground_in)]
    gates = ["--ella", "in-comfyui-ella.safetensors", "--text-encoder", "in-comfyui-t5.safetensors"]
    assert main(["inspect", module.name, "--gate-map", str(tmp_path / "gates.png"), *gates, *where]) == 0
    assert "EMMA style module" in capsys.readouterr().out and (tmp_path / "gates.png").is_file()
    assert main(["card", module.name, "--out", str(tmp_path / "card"), *gates, *where]) == 0
    assert (tmp_path / "card" / module.name).is_file() and (tmp_path / "card" / "gates.png").is_file()
    assert main(["calibrate", module.name, "1.5", *where]) == 0
    assert load_module(module).config.calibrated_strength == 1.5


def test_a_name_that_is_nowhere_is_told_with_the_folders(playground_in, tmp_path, capsys):
    where = ["--comfyui", str(playground_in)]
    assert main(["inspect", "none.safetensors", *where]) == 1
    assert f"the module = 'none.safetensors' does not exist, as a path or in ComfyUI's folders ({playground_in}" in (
        capsys.readouterr().err)
    assert main(["inspect", "in-comfyui-emma-style.safetensors", "--ella", "none.safetensors", *where]) == 1
    assert "--ella = 'none.safetensors' does not exist" in capsys.readouterr().err


def test_arguments_get_comfyuis_tokenizer_where_settings_do(with_tokenizer):
    text_encoder = single_t5(with_tokenizer / "models" / "text_encoders")
    options = argparse.Namespace(comfyui=str(with_tokenizer), text_encoder=Path(text_encoder.name), ella=None)
    found = find_files(options)
    assert found.text_encoder == text_encoder and found.tokenizer == str(open_comfyui(with_tokenizer).tokenizer)
