"""A small evaluation on the playground: two references, two prompts, and scoring models with random weights."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from emma_core.playground import PLAYGROUND_DIR

CLIP, DINO = "emma-test-clip", "test_vit.r160_in1k"
PROMPTS = ("woman astronaut", "man cook")
SUBJECTS = {"ada": "style-noto", "bob": "face-dark"}
_CLIP_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"width": 64, "heads": 2, "layers": 2, "vocab_size": 49408, "context_length": 77},
}


def make_world(folder: Path) -> Path:
    """References, prompts, scoring models and a configuration `eval.toml` in a folder."""
    for subject, picture in SUBJECTS.items():
        (folder / "references" / subject).mkdir(parents=True)
        shown = Image.open(PLAYGROUND_DIR / "references" / f"{picture}.png").convert("RGB")
        shown.save(folder / "references" / subject / "1.png")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    clip, dino = scoring_models(folder)
    save_file(_filled(clip), folder / "clip.safetensors")
    save_file(_filled(dino), folder / "dino.safetensors")
    return write_config(folder / "eval.toml", tables_for(folder))


def tables_for(folder: Path) -> dict[str, dict]:
    """The configuration of `make_world`: both modules of the playground, two steps."""
    modules = [str(PLAYGROUND_DIR / f"emma-{condition}.safetensors") for condition in ("style", "face")]
    return {
        "output": {"folder": str(folder / "results")}, "plan": {"per_pair": 1},
        "modules": {"files": modules, "strengths": ["1"]}, "references": {"folder": str(folder / "references")},
        "prompts": {"file": str(folder / "prompts.txt")}, "sampling": {"steps": 2, "guidance": 4.0, "batch": 3},
        "scores": {"clip_model": CLIP, "clip_file": str(folder / "clip.safetensors"), "dino_model": DINO,
                   "dino_file": str(folder / "dino.safetensors")},
    }


def write_config(path: Path, tables: dict[str, dict]) -> Path:
    lines = [line for section, table in tables.items()
             for line in (f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def scoring_models(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The small CLIP, made known to open_clip, and timm's smallest ViT; built by the libraries, at random."""
    config = folder / f"{CLIP}.json"
    config.write_text(json.dumps(_CLIP_CONFIG), encoding="utf-8")
    open_clip.add_model_config(config)
    return open_clip.create_model(CLIP, pretrained=None), timm.create_model(DINO, num_classes=0)


def forget_scoring_models() -> None:
    """Take the small CLIP out of open_clip's list, as other tests count its models."""
    factory = sys.modules["open_clip.factory"]
    factory._MODEL_CONFIG_PATHS[:] = [path for path in factory._MODEL_CONFIG_PATHS if path.stem != CLIP]
    factory._MODEL_CONFIGS.pop(CLIP, None)


def _filled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that differ from every start of the libraries, so that a file that is not read shows."""
    generator = torch.Generator().manual_seed(5)
    return {name: (value + 0.05 * torch.randn(value.shape, generator=generator)).contiguous()
            for name, value in model.state_dict().items()}


def two_boxes(folder: Path, segmentation: dict | list) -> tuple[Path, Path]:
    """A COCO file of one random picture 80 x 60 with two annotations and a crowd, and its folder."""
    (folder / "pictures").mkdir()
    noise = bytes(random.Random(2).randrange(256) for _ in range(80 * 60 * 3))
    Image.frombytes("RGB", (80, 60), noise).save(folder / "pictures" / "7.png")
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10.0, 20.0, 30.0, 24.5], "segmentation": segmentation},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 5, 50]},
        {"id": 3, "image_id": 7, "category_id": 3, "bbox": [0, 0, 60, 60], "iscrowd": 1},
    ]
    content = {"images": [{"id": 7, "file_name": "7.png", "width": 80, "height": 60}], "annotations": annotations,
               "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "tie"}]}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "instances.json", folder / "pictures"
