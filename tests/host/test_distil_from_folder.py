"""IP-Adapter Teacher on a training set with groups and masks: a module learns what it makes of the references."""

from __future__ import annotations

import json

import comfy.clip_vision
import folder_paths
import pytest
from PIL import Image, ImageDraw
from sd15_layout import ATTENTION_WIDTHS, CLIP_VISION, SD15_UNET, save_ipadapter
from tiny_models import TEXT_DIM, WIDTH, fill_, save_t5

NAMES = ("ada/1", "ada/2", "bob/1", "bob/2")


@pytest.fixture
def pictures(monkeypatch, tmp_path):
    """Files of two groups of two pictures with masks, in the order that they are read in."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    found = []
    for index, name in enumerate(NAMES):
        path = tmp_path / "input" / "people" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture, mask = Image.new("RGB", (64, 64), (60 * index, 90, 200)), Image.new("L", (64, 64), 0)
        for drawn, colour in ((picture, (250, 60 * index, 0)), (mask, 255)):
            ImageDraw.Draw(drawn).ellipse((10, 10, 50, 50), fill=colour)
        picture.save(path)
        mask.save(path.with_suffix(".mask.png"))
        path.with_suffix(".txt").write_text(f"picture {index}", encoding="utf-8")
        found.append(path)
    return found


@pytest.fixture(scope="module")
def teacher_of(run_node, base_directory, tmp_path_factory):
    config = tmp_path_factory.mktemp("clip_vision") / "config.json"
    config.write_text(json.dumps(CLIP_VISION))
    clip_vision = comfy.clip_vision.ClipVisionModel(str(config))
    fill_(clip_vision.model, 75)
    save_ipadapter(base_directory / "models" / "ipadapter" / "folder-teacher.safetensors", WIDTH, ATTENTION_WIDTHS)
    return lambda weight=1.5: run_node("EMMAIPAdapterTeacher", ip_adapter="folder-teacher.safetensors", clip_vision=clip_vision,
                                       weight=weight, blocks="all")[0]


@pytest.fixture
def distil(run_node, tiny, vae, teacher_of, pictures, pack_import, tmp_path):
    """`distil(...)`: Train EMMA Module on the folder with its masks, taught."""
    def run(**changes):
        place = tmp_path / "t5"
        place.mkdir(exist_ok=True)
        save_t5(place, TEXT_DIM)
        clip = pack_import("host.text_encoder").load_text_encoder_clip(place)
        given = {"folder": "people", "vae": vae, "clip": clip, "resolution": 64, "use_masks": True, "flip": True,
                 "reference_crops": 1, "own_reference": False}
        loaded = run_node("EMMALoadTrainingFolder", **{key: [value] for key, value in given.items()})[0]
        settings = {"model": tiny.model(sizes=SD15_UNET), "teacher": teacher_of(), "training_set": loaded, "name": "run",
                    "encoder": pack_import("host.encoders").load_playground_reference_encoder(), "condition": "style",
                    "steps": 12, "batch": 2, "accumulate": 1, "rate": 5e-3, "gate_rate": 20.0, "seed": 3, "precision": "fp32",
                    "timestep_power": 0.3, "inverse_snr": 0.0, "average": 0.0, "checkpoint_every": 100,
                    "ella": tiny.ella(), **changes}
        return run_node("EMMATrainModule", **{key: [value] for key, value in settings.items()})
    return run


def test_a_module_learns_from_the_teacher_on_a_folder_with_groups_and_masks(distil):
    """The same draws without a rate do not fall so far."""
    still = distil(rate=0.0, name="still")[1]["loss"]
    module, losses, report = distil()
    assert sum(losses["loss"][-6:]) < 0.9 * sum(still[-6:]) and "12 updates" in report
    described = module.module.config
    assert described.training["recipe"]["teacher"] == "IP-Adapter" and described.encoder["masked"]
    assert (described.training["data"]["groups"], described.training["data"]["pictures"]) == (2, 4)
