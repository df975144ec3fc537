"""What an evaluation reads and leaves, and texts that are typed into widgets and commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data_files import data_folder
from evaluation_world import CLIP, DINO, scoring_models, two_boxes
from safetensors.torch import save_file
from small_t5 import random_t5_encoder, save_single
from target import target

from emma_core.encoders.face_alignment import parse_keypoints
from emma_core.errors import EmmaError
from emma_core.evaluation.coco import coco_captions, coco_references
from emma_core.evaluation.config import PromptsConfig, ReferencesConfig, ScoresConfig, resolve_evaluation
from emma_core.evaluation.references import prompts_in, references_in
from emma_core.evaluation.scorers import load_scorer
from emma_core.evaluation.scores import ScoreFile
from emma_core.model.frame_values import parse_keyframes, values_over_frames
from emma_core.settings import read_toml, toml_of
from emma_core.text.encoder import load_text_encoder

# evaluation

def _coco(folder: Path) -> None:
    two_boxes(folder, {"size": [60, 80], "counts": [1000, 500, 3300]})
    captions = [{"id": number, "image_id": number % 2, "caption": f"caption {number}"} for number in range(4)]
    (folder / "captions.json").write_text(json.dumps({"annotations": captions}))


def _polygons(folder: Path) -> None:
    two_boxes(folder, [[10.0, 20.0, 40.0, 20.0, 40.0, 44.0, 10.0, 44.0]])


def _use_coco(folder: Path) -> None:
    config = ReferencesConfig(coco=str(folder / "instances.json"), images=str(folder / "pictures"), smallest_px=1)
    for reference in coco_references(config)[0]:
        reference.picture()
        if reference.mask:
            reference.mask_picture()


def _scores(folder: Path) -> None:
    line = {"model": "m", "row": "r", "reference_sha256": "0", "prompt": "a", "seed": 1, "scores": {"CLIP-T": 0.5}}
    (folder / "scores.jsonl").write_text("".join(json.dumps({**line, "picture": str(row)}) + "\n" for row in range(4)))


def _scorer(position: int, name: str) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        state = scoring_models(folder)[position].state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name)

    return make


def _use_clip_scorer(folder: Path) -> None:
    import open_clip

    if CLIP not in open_clip.list_models():
        open_clip.add_model_config(folder / f"{CLIP}.json")
    load_scorer("clip", ScoresConfig(clip_model=CLIP, clip_file=str(folder / "clip.safetensors"))).embed_prompts(["a cat"])


target("COCO's run lengths", "instances.json pictures/7.png", _coco, _use_coco)
target("COCO's polygons", "instances.json", _polygons, _use_coco)
target("COCO's captions", "captions.json", _coco,
       lambda folder: coco_captions(PromptsConfig(captions=str(folder / "captions.json"))))
target("references of an evaluation", "data/a/1.png data/a/a.mask.png", data_folder,
       lambda folder: [one.picture() for one in references_in(ReferencesConfig(folder=str(folder / "data")))])
target("scores", "scores.jsonl", _scores, lambda folder: ScoreFile(folder / "scores.jsonl"))
target("CLIP that scores", "clip.safetensors", _scorer(0, "clip.safetensors"), _use_clip_scorer, share=0.1)
target("DINO that scores", "dino.safetensors", _scorer(1, "dino.safetensors"),
       lambda folder: load_scorer("dino", ScoresConfig(dino_model=DINO, dino_file=str(folder / "dino.safetensors"))), share=0.5)
target("configuration of an evaluation", "a.toml",
       lambda folder: (folder / "a.toml").write_text(toml_of(resolve_evaluation({})), encoding="utf-8"),
       lambda folder: resolve_evaluation(read_toml(folder / "a.toml")))
target("prompts of an evaluation", "a.txt", lambda folder: (folder / "a.txt").write_text("a cat\na dog\n"),
       lambda folder: prompts_in(PromptsConfig(file=str(folder / "a.txt"))))


# texts that are typed

def _typed(path: Path) -> str:
    """What stands in a widget; where there is no file there is no text."""
    if not path.is_file():
        raise EmmaError(f"{path} holds no text")
    return path.read_text(encoding="utf-8", errors="surrogateescape")


def _prompt(folder: Path) -> None:
    save_single(folder, random_t5_encoder())
    (folder / "a.txt").write_text("a (red:1.2) cat on ((the)) \\(blue\\) sofa")


def _use_prompt(folder: Path) -> None:
    text = _typed(folder / "a.txt")
    [features_1ND] = load_text_encoder(folder / "t5.safetensors").encode_weighted([text])
    assert torch.isfinite(features_1ND).all()


target("keypoints", "a.txt",
       lambda folder: (folder / "a.txt").write_text("30 30 60 30 45 45 32 60 58 60; 3 3 6 3 4 4 3 6 5 6\n"),
       lambda folder: parse_keypoints(_typed(folder / "a.txt")))
target("keypoints in JSON", "a.json",
       lambda folder: (folder / "a.json").write_text(json.dumps([[[[30, 30], [60, 30], [45, 45], [32, 60], [58, 60]]]])),
       lambda folder: parse_keypoints(_typed(folder / "a.json")))
target("prompt", "a.txt", _prompt, _use_prompt)
target("keyframes", "a.txt", lambda folder: (folder / "a.txt").write_text("0: 0.5, 12: 1.0\n24: 0.25\n"),
       lambda folder: values_over_frames(
           parse_keyframes(_typed(folder / "a.txt")), 16, "ease"))
