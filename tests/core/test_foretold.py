"""A dry run finds whatever would stop a run: each of many planted faults alone, and all of them at once."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from clip_towers import TINY, random_tower
from PIL import Image
from safetensors.torch import save_file
from small_t5 import random_t5_encoder

from emma_core.__main__ import main
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.playground import PLAYGROUND_DIR
from emma_core.training import sizes
from emma_core.training.config import resolve
from emma_core.training.foretold import problems_of

DiskUsage = namedtuple("DiskUsage", "total used free")


def tensors(folder: Path, name: str, **shapes: tuple[int, ...]) -> str:
    """A file of zeros."""
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, folder / name)
    return str(folder / name)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of four captioned pictures with masks, and the settings of a run on them that nothing is wrong with."""
    monkeypatch.setitem(CLIP_TOWERS, "clip-tiny", TINY)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        Image.new("RGB", (128, 128), (40 * index, 90, 120)).save(pictures / f"{index}.png")
        Image.new("L", (128, 128), 255).save(pictures / f"{index}.mask.png")
        (pictures / f"{index}.txt").write_text(f"a thing {index}")
    save_file(random_tower(TINY), tmp_path / "clip.safetensors")
    settings = {"data.folder": str(pictures), "output.folder": str(tmp_path / "run"), "data.workers": 0}
    return tmp_path, settings


def lora_file(folder: Path) -> str:
    return tensors(folder, "no-lora.safetensors", **{"something.weight": (2, 2)})


def truncated(folder: Path) -> str:
    shutil.copyfile(PLAYGROUND_DIR / "unet.safetensors", folder / "cut.safetensors")
    with open(folder / "cut.safetensors", "r+b") as stream:
        stream.truncate(100_000)
    return str(folder / "cut.safetensors")


def damaged_picture(folder: Path) -> dict:
    (folder / "pictures" / "0.png").write_bytes(b"no picture")
    return {}


def strange_caption(folder: Path) -> dict:
    (folder / "pictures" / "1.txt").write_bytes(b"\xff\xfe\xff")
    return {}


def other_mask(folder: Path) -> dict:
    Image.new("L", (128, 32), 255).save(folder / "pictures" / "2.mask.png")
    return {}


def no_mask(folder: Path) -> dict:
    (folder / "pictures" / "3.mask.png").unlink()
    return {"encoder.masked": True}


def no_picture(folder: Path) -> dict:
    (folder / "sample.png").write_text("words")
    return {"report.sample_references": (str(folder / "sample.png"),)}


def behind_a_file(folder: Path) -> dict:
    (folder / "taken").touch()
    return {"output.folder": str(folder / "taken" / "run")}


def faceid(folder: Path) -> str:
    return tensors(folder, "faceid.safetensors", **{"image_proj.proj.0.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)})


# what is planted: settings, files changed in the folder; what is told
FAULTS = {
    "name": (lambda folder: {"output.name": "a/b"}, "output.name = 'a/b'"),
    "bucket step": (lambda folder: {"data.bucket_step_px": 12}, "data.bucket_step_px = 12"),
    "drops": (lambda folder: {"objective.drop_text": 0.6, "objective.drop_both": 0.6}, "add up to 1.25"),
    "two teachers": (lambda folder: {"teacher.lora": lora_file(folder), "teacher.ip_adapter": faceid(folder)},
                     "are both given"),
    "mirrored own latents": (lambda folder: {"teacher.own_latents": True, "teacher.lora": lora_file(folder), "data.flip": True},
                             "data.flip does not go with"),
    "prompts": (lambda folder: {"teacher.own_latents": True, "teacher.prompts": "none.txt"}, "'none.txt' cannot be read"),
    "sample reference": (no_picture, "report.sample_references = .* wanted a picture"),
    "tensorboard": (lambda folder: {"report.tensorboard": True}, "TensorBoard is not installed"),
    "checkpoint cut off": (lambda folder: {"base.checkpoint": truncated(folder)}, "cut.safetensors is truncated or damaged"),
    "vae": (lambda folder: {"base.vae": tensors(folder, "vae.safetensors", a=(2, 2))}, "vae.safetensors holds no autoencoder"),
    "base lora": (lambda folder: {"base.lora": lora_file(folder)}, "no-lora.safetensors has no weights for a UNet"),
    "ella": (lambda folder: {"ella.file": str(PLAYGROUND_DIR / "emma-style.safetensors")},
             "emma-style.safetensors holds .* none of an ELLA connector"),
    "text encoder": (lambda folder: {"ella.text_encoder": tensors(folder, "t.safetensors", **{"text_model.x": (2,)})},
                     "t.safetensors is a CLIP model"),
    "tokenizer": (lambda folder: {"ella.tokenizer": "no.json"}, "ella.tokenizer = 'no.json' does not exist"),
    "encoder": (lambda folder: {"module.condition": "face", "encoder.file": str(folder / "clip.safetensors")},
                "clip.safetensors is CLIP ViT, .* Choose AdaFace"),
    "start": (lambda folder: {"module.condition": "face", "module.start": str(PLAYGROUND_DIR / "emma-style.safetensors")},
              "module.start = .* reads"),
    "ip-adapter": (lambda folder: {"teacher.ip_adapter": faceid(folder)},
                   "faceid.safetensors is an IP-Adapter of another kind"),
    "image encoder": (lambda folder: {"teacher.ip_adapter": faceid(folder), "teacher.ip_image_encoder": "no.safetensors"},
                      "teacher.ip_image_encoder = 'no.safetensors' does not exist"),
    "teacher lora": (lambda folder: {"teacher.lora": "no-teacher.safetensors"},
                     "teacher.lora = 'no-teacher.safetensors' does not exist"),
    "picture": (damaged_picture, "0.png: .*"),
    "caption": (strange_caption, "1.txt is not UTF-8"),
    "mask": (other_mask, "another shape than the picture's 128 x 128"),
    "no mask": (no_mask, "3.png: has no mask, but encoder.masked is on"),
    "folder": (behind_a_file, "output.folder = .*taken.* cannot be written: .* file"),
    "disk": (lambda folder: {"report.keep": 100_000}, "GB free. Make room"),
}
ALONE = {
    "blocks": (lambda folder: {"teacher.ip_adapter": adapter(folder, 128), "teacher.blocks": "style",
                               "teacher.ip_image_encoder": str(folder / "clip.safetensors")},
               "this model has 1. Choose the blocks `all`"),
    "another base's adapter": (lambda folder: {"teacher.ip_adapter": adapter(folder, 2048),
                                               "teacher.ip_image_encoder": str(folder / "clip.safetensors")},
                               "makes tokens of width 2048, and playground has 128"),
    "another clip's adapter": (lambda folder: {"teacher.ip_adapter": adapter(folder, 128, dim=77),
                                               "teacher.ip_image_encoder": str(folder / "clip.safetensors")},
                               f"reads vectors of 77, and the image encoder gives {TINY.projected}"),
    "another ella's t5": (lambda folder: {"ella.text_encoder": t5(folder)}, "gives text features of width 32, this ELLA"),
    "no data": (lambda folder: {"data.folder": str(folder / "nothing")}, "is no folder; wanted one with pictures"),
}


def adapter(folder: Path, width: int, dim: int = TINY.projected) -> str:
    return tensors(folder, "ip.safetensors", **{
        "image_proj.proj.weight": (4 * width, dim), "ip_adapter.1.to_k_ip.weight": (4, width),
        "ip_adapter.1.to_v_ip.weight": (4, width)})


def t5(folder: Path) -> str:
    save_file(random_t5_encoder(), folder / "other-t5.safetensors")
    return str(folder / "other-t5.safetensors")


def told(settings: dict, monkeypatch) -> str:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else real(name, *more))
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path: DiskUsage(10**12, 0, 10**11))
    return "\n".join(f"{problem.where}: {problem.text}" for problem in problems_of(resolve({}, "small-card", settings))[1]
                     if problem.fatal)


def test_nothing_is_found_where_nothing_is_wrong(world, monkeypatch):
    _, settings = world
    assert told(settings, monkeypatch) == ""


@pytest.mark.parametrize("fault", [*FAULTS, *ALONE])
def test_each_fault_is_found(world, monkeypatch, fault):
    folder, settings = world
    plant, message = {**FAULTS, **ALONE}[fault]
    assert re.search(message, told({**settings, **plant(folder)}, monkeypatch))


def test_all_faults_are_found_at_once(world, monkeypatch):
    folder, settings = world
    for plant, _ in FAULTS.values():
        settings = {**settings, **plant(folder)}
    found = told(settings, monkeypatch)
    assert len(FAULTS) == 25
    assert not [fault for fault, (_, message) in FAULTS.items() if not re.search(message, found)], found


def test_a_folder_of_another_run_is_found(world, monkeypatch):
    from training_world import tiny_config, tiny_trainer

    folder, settings = world
    tiny_trainer(folder / "run", tiny_config()).save()
    assert "belongs to a run with other settings" in told(settings, monkeypatch)


def test_without_an_output_folder_the_rest_is_still_checked(world, monkeypatch):
    _, settings = world
    assert told({**settings, "output.folder": ""}, monkeypatch) == ""
    assert "output.name = 'a/b'" in told({**settings, "output.folder": "", "output.name": "a/b"}, monkeypatch)


def test_names_that_no_comfyui_folder_has_are_all_told_at_once(world, tmp_path, capsys):
    _, settings = world
    (tmp_path / "ComfyUI" / "models").mkdir(parents=True)
    (tmp_path / "ComfyUI" / "main.py").touch()
    names = {"base.checkpoint": "no-base.safetensors", "ella.file": "no-ella.safetensors",
             "encoder.file": "no-encoder.safetensors"}
    words = [word for key, value in {**settings, **names}.items() for word in (f"--{key}", str(value))]
    assert main(["train", "--dry-run", "--comfyui", str(tmp_path / "ComfyUI"), *words]) == 1
    said = capsys.readouterr().out
    assert all(name in said for name in names.values()) and "this run cannot start" in said
