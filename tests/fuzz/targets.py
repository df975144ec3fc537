"""Every reader of strangers' files: a small valid file for it, and how it is read and used."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from clip_towers import TINY, random_tower, to_open_clip
from evaluation_world import CLIP, DINO, scoring_models, two_boxes
from PIL import Image
from safetensors.torch import save_file
from small_models import OBJECT, small_connector, small_features, small_module, small_text, token_module
from small_t5 import PROMPT, SIZES, random_t5_encoder, save_sharded, save_single
from test_adaface import weights_of
from test_open_clip_models import tiny
from test_open_clip_models import write_config as write_open_clip
from test_training_backbones import diffusers_lora, inputs, kohya_lora, lora_layers, save_folder, single_file
from test_training_teachers import plain_adapter, plus_adapter
from training_world import tiny_config, tiny_trainer, write_shard

from emma_core import Assembly, Reference, load_connector, load_module, save_module
from emma_core.__main__ import main
from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.encoders.face_alignment import parse_keypoints
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.encoders.loading import load_encoder
from emma_core.errors import EmmaError
from emma_core.evaluation.coco import coco_captions, coco_references
from emma_core.evaluation.config import PromptsConfig, ReferencesConfig, ScoresConfig, resolve_evaluation
from emma_core.evaluation.references import prompts_in, reference_of, references_in
from emma_core.evaluation.scorers import load_scorer
from emma_core.evaluation.scores import ScoreFile
from emma_core.files.comfyui_folders import open_comfyui
from emma_core.files.connector_file import save_connector
from emma_core.files.module_file import read_module_config
from emma_core.files.reference_file import load_reference, save_reference
from emma_core.model.frame_values import parse_keyframes, values_over_frames
from emma_core.model.reference_features import ReferenceFeatures
from emma_core.playground import PLAYGROUND_DIR
from emma_core.settings import read_toml, toml_of
from emma_core.text.encoder import load_text_encoder
from emma_core.training.checks import check
from emma_core.training.config import DataConfig, TeacherConfig, resolve
from emma_core.training.examples import contents_of, describe, read_examples, require
from emma_core.training.log import Log
from emma_core.training.own_latents import read_prompts
from emma_core.training.reports import draw_loss_curve
from emma_core.training.shards import Processes
from emma_core.training.store import FeatureStore
from emma_core.training.teachers import load_teacher


@dataclass(frozen=True)
class Target:
    """One reader.

    Args:
        make: writes a valid file, or several, into an empty folder.
        load: reads it from there, and uses what it got as its callers do.
        files: names of those that are damaged in turn.
        share: of the inputs, beside the others'; less where the smallest valid file is large.
    """

    make: Callable[[Path], Any]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    share: float = 1.0


TARGETS: dict[str, Target] = {}
_PICTURES = {"png": "RGBA", "jpg": "RGB", "webp": "RGBA", "gif": "P", "tiff": "RGB", "bmp": "RGB", "tga": "RGB", "ppm": "RGB",
             "jp2": "RGB", "avif": "RGB"}
CLIP_TOWERS["clip-tiny"] = TINY  # the smallest that the code would ever meet is 600 MB


def target(name: str, files: str, make: Callable[[Path], Any], load: Callable[[Path], Any], share: float = 1.0) -> None:
    """Add one to TARGETS."""
    TARGETS[name] = Target(make, load, tuple(files.split()), share)


def _command(*arguments: str) -> None:
    """A command, whose refusals are told and not raised."""
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        if main(arguments):
            raise EmmaError(told.getvalue())


# modules, connectors, references

def _use_module(path: Path) -> None:
    read_module_config(path)
    module = load_module(path)
    reference = Reference(module, small_features(module))
    small_connector().tokens(small_text(), torch.tensor([500.0]), Assembly([reference]))


def _use_connector(path: Path) -> None:
    connector = load_connector(path)
    connector.tokens(torch.zeros(1, 3, connector.config.text_dim), torch.tensor([500.0]), Assembly([]))


def _reference(folder: Path) -> None:
    features = {"global": torch.randn(2, 1, 24), "local": torch.randn(2, 5, 20)}
    described = {"family": "tiny", "fingerprint": "0" * 64}
    save_reference(ReferenceFeatures(features, described, per_frame=True), folder / "a.safetensors")


def _use_reference(path: Path) -> None:
    found = load_reference(path)
    module = small_module("object", features=OBJECT)
    Reference(module, dict(found.features))


target("module", "a.safetensors", lambda folder: save_module(small_module("object", features=OBJECT), folder / "a.safetensors"),
       lambda folder: _use_module(folder / "a.safetensors"))
target("module on own tokens", "a.safetensors", lambda folder: save_module(token_module(), folder / "a.safetensors"),
       lambda folder: load_module(folder / "a.safetensors"))
target("inspect", "a.safetensors",
       lambda folder: save_module(small_module(), folder / "a.safetensors", metadata={"modelspec.title": "a title"}),
       lambda folder: _command("inspect", str(folder / "a.safetensors")))
target("calibrate", "a.safetensors", lambda folder: save_module(small_module(), folder / "a.safetensors"),
       lambda folder: _command("calibrate", str(folder / "a.safetensors"), "0.9"))
target("ELLA", "a.safetensors", lambda folder: save_connector(small_connector(), folder / "a.safetensors"),
       lambda folder: _use_connector(folder / "a.safetensors"))
target("reference", "a.safetensors", _reference, lambda folder: _use_reference(folder / "a.safetensors"))


# text encoders

def _t5_folder(folder: Path) -> None:
    save_sharded(folder / "t5", random_t5_encoder())
    config = {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu"}
    (folder / "t5" / "config.json").write_text(json.dumps(config))


_SHARDS = "t5/model-00001-of-00002.safetensors t5/model-00002-of-00002.safetensors"
target("T5 file", "t5.safetensors", lambda folder: save_single(folder, random_t5_encoder(), metadata={"t5": json.dumps(SIZES)}),
       lambda folder: load_text_encoder(folder / "t5.safetensors", width=SIZES["d_model"]).encode([PROMPT]))
target("T5 folder", f"t5/config.json t5/model.safetensors.index.json {_SHARDS}", _t5_folder,
       lambda folder: load_text_encoder(folder / "t5").encode([PROMPT]))
target("tokenizer", "t5/tokenizer.json", _t5_folder, lambda folder: load_text_encoder(folder / "t5").encode([PROMPT]))


# reference encoders

def _clip_folder(folder: Path) -> None:
    (folder / "clip").mkdir()
    save_file(random_tower(TINY), folder / "clip" / "model.safetensors")
    config = {"hidden_size": TINY.hidden, "hidden_act": TINY.hidden_act, "num_hidden_layers": TINY.layers}
    (folder / "clip" / "config.json").write_text(json.dumps(config))


def _open_clip_folder(folder: Path) -> None:
    import open_clip

    (folder / "a").mkdir()
    model = tiny()
    write_open_clip(folder / "a", model, preprocess_cfg={"mean": [0.5] * 3, "std": [0.5] * 3})
    open_clip.add_model_config(_named(folder / "tiny-fuzz.json", model))
    state = open_clip.create_model("tiny-fuzz", pretrained=None).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "a" / "open_clip_model.safetensors")


def _named(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


def _half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}


target("CLIP file", "a.safetensors", lambda folder: save_file(random_tower(TINY), folder / "a.safetensors"),
       lambda folder: load_encoder(folder / "a.safetensors"))
target("CLIP folder", "clip/config.json clip/model.safetensors", _clip_folder, lambda folder: load_encoder(folder / "clip"))
target("CLIP in open_clip's names", "a.bin", lambda folder: torch.save(to_open_clip(random_tower(TINY)), folder / "a.bin"),
       lambda folder: load_encoder(folder / "a.bin"))
target("open_clip folder", "a/open_clip_config.json a/open_clip_model.safetensors", _open_clip_folder,
       lambda folder: load_encoder(folder / "a"))
target("AdaFace", "a.ckpt", lambda folder: torch.save(
    {"state_dict": {f"model.{key}": value for key, value in _half(weights_of(18)).items()}}, folder / "a.ckpt"),
    lambda folder: load_encoder(folder / "a.ckpt"), share=0.02)
target("playground encoder", "encoder.safetensors", lambda folder: shutil.copy(PLAYGROUND_DIR / "encoder.safetensors", folder),
       lambda folder: load_encoder(folder / "encoder.safetensors"), share=0.3)


# bases, LoRAs, teachers

def _single_file(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as other:
        single_file(save_folder(Path(other) / "small"), folder / "a.safetensors", prediction="epsilon")


def _playground(folder: Path) -> None:
    for name in ("unet.safetensors", "autoencoder.safetensors"):
        shutil.copy(PLAYGROUND_DIR / name, folder)


def _autoencoder(folder: Path) -> None:
    save_folder(folder / "other")
    (folder / "other" / "vae").rename(folder / "vae")
    shutil.rmtree(folder / "other")


@cache
def _base():
    """A small base, made once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        return load_backbone(BaseConfig(str(save_folder(Path(folder) / "small"))))


@cache
def _playground_base():
    return load_backbone(BaseConfig())


def _lora(layout: Callable, **how: Any) -> Callable[[Path], Any]:
    return lambda folder: save_file(layout(lora_layers(_base().unet), **how), folder / "a.safetensors", {"ss_network_dim": "2"})


def _merge(path: Path) -> None:
    from emma_core.base.lora import merge_lora

    merge_lora(copy.deepcopy(_base().unet), path)


def _adapter(layout: Callable) -> Callable[[Path], Any]:
    def make(folder: Path) -> None:
        _clip_folder(folder)
        save_file(_half(layout(_playground_base().unet)), folder / "a.safetensors")

    return make


def _teach(folder: Path) -> None:
    config = TeacherConfig(ip_adapter=str(folder / "a.safetensors"), ip_image_encoder=str(folder / "clip"))
    load_teacher(config, _playground_base())


_UNET, _VAE = "diffusion_pytorch_model.safetensors", "vae/config.json vae/diffusion_pytorch_model.safetensors"
target("single file", "a.safetensors", _single_file,
       lambda folder: load_backbone(BaseConfig(str(folder / "a.safetensors"))).predict_noise(*inputs()), share=0.5)
target("diffusers folder", f"unet/config.json unet/{_UNET} {_VAE} scheduler/scheduler_config.json",
       save_folder, lambda folder: load_backbone(BaseConfig(str(folder))).predict_noise(*inputs()), share=0.5)
target("autoencoder", _VAE, _autoencoder, lambda folder: load_backbone(BaseConfig(vae=str(folder / "vae"))), share=0.5)
target("playground folder", "unet.safetensors autoencoder.safetensors", _playground,
       lambda folder: load_backbone(BaseConfig(str(folder))), share=0.2)
target("LoRA of kohya", "a.safetensors", _lora(kohya_lora), lambda folder: _merge(folder / "a.safetensors"))
target("LoRA of diffusers", "a.safetensors", _lora(diffusers_lora), lambda folder: _merge(folder / "a.safetensors"))
target("LoRA as teacher", "a.safetensors", _lora(kohya_lora),
       lambda folder: load_teacher(TeacherConfig(lora=str(folder / "a.safetensors")), _base()))
target("IP-Adapter", "a.safetensors", _adapter(plain_adapter), _teach, share=0.3)
target("IP-Adapter Plus", "a.safetensors", _adapter(plus_adapter), _teach, share=0.3)


# pictures

def _picture(mode: str = "RGB", size: tuple[int, int] = (72, 64)) -> Image.Image:
    red, green = Image.linear_gradient("L").resize(size), Image.radial_gradient("L").resize(size)
    return Image.merge("RGB", (red, green, red.rotate(90))).convert(mode)


def _masked(folder: Path) -> None:
    _picture().save(folder / "a.png")
    Image.radial_gradient("L").resize((72, 64)).save(folder / "a.mask.png")


for _ending, _mode in _PICTURES.items():
    target(f"{_ending} picture", f"a.{_ending}",
           lambda folder, ending=_ending, mode=_mode: _picture(mode).save(folder / f"a.{ending}"),
           lambda folder, ending=_ending: reference_of(folder / f"a.{ending}").picture(), 1.0 if _ending == "png" else 0.3)
target("mask", "a.mask.png", _masked, lambda folder: reference_of(folder / "a.png").mask_picture())


# training

def _data_folder(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        _picture(size=(96, 96)).save(folder / "data" / name / "1.png")
        (folder / "data" / name / "1.txt").write_text("a red cat\na cat\n")
    _masked(folder / "data" / "a")


def _jsonl(folder: Path) -> None:
    _data_folder(folder)
    Image.radial_gradient("L").resize((96, 96)).save(folder / "b.mask.png")
    lines = [{"image": "data/a/1.png", "captions": ["a", "b"], "group": "x", "references": ["data/b/1.png"]},
             {"image": "data/b/1.png", "caption": "c", "reference": "data/a/a.png", "mask": "b.mask.png"}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))


def _shard(folder: Path) -> None:
    stored = io.BytesIO()
    _picture(size=(96, 96)).save(stored, "PNG")
    write_shard(folder / "a.tar", {"1.png": stored.getvalue(), "1.txt": "a cat", "2.png": stored.getvalue(),
                                   "2.json": json.dumps({"caption": "a dog", "group": "x"}), "2.ref.png": stored.getvalue()})


def _comfyui(folder: Path) -> None:
    (folder / "main.py").touch()
    (folder / "models" / "emma").mkdir(parents=True)
    (folder / "extra_model_paths.yaml").write_text(
        "a1111:\n    base_path: webui\n    is_default: true\n    emma: |\n        models/emma\n        more\n    clip: clip\n")


def _examine(data: DataConfig) -> None:
    examples, problems = read_examples(data)
    describe(examples, problems, data)
    require(examples, problems)
    contents_of([file for example in examples for file in example.files()], 0, Processes())


def _checkpoint(folder: Path) -> None:
    tiny_trainer(folder, tiny_config(train__steps=1, train__batch=2, train__average=0.9)).run()


def _resume(folder: Path) -> None:
    tiny_trainer(folder, tiny_config(train__steps=1, train__batch=2, train__average=0.9)).resume()


def _log(folder: Path) -> None:
    for step in (1, 2, 3):
        Log(folder / "log.jsonl").write(step=step, loss=0.5 / step, rate=1e-4, seconds=1.0, buckets=[0.5, None, 0.25, 0.2, 0.1],
                                        gates={"A": [0.1], "F": [0.2]})


def _store(folder: Path) -> None:
    store = FeatureStore(folder, {"version": 1})
    store.put_many({key: {"latent": torch.randn(4, 4, 4)} for key in "abc"})
    (folder / "where.txt").write_text(store.folder.name)
    os.rename(next(store.folder.glob("*.safetensors")), store.folder / "shard.safetensors")
    os.rename(store.folder, folder / "store")


def _use_store(folder: Path) -> None:
    os.rename(folder / "store", folder / (folder / "where.txt").read_text())
    store = FeatureStore(folder, {"version": 1})
    for key in sorted(set("abc") - set(store.missing("abc"))):
        store.get(key)


_DATA = dict(resolution_px=64, workers=0)
target("data folder", "data/a/1.png data/a/1.txt data/b/1.txt data/a/a.mask.png", _data_folder,
       lambda folder: _examine(DataConfig(folder=str(folder / "data"), **_DATA)))
target("data in JSON lines", "a.jsonl", _jsonl, lambda folder: _examine(DataConfig(jsonl=str(folder / "a.jsonl"), **_DATA)))
target("shards", "a.tar", _shard, lambda folder: _examine(DataConfig(shards=str(folder / "a.tar"), **_DATA)))
target("checkpoint of a training", "checkpoint-00000001.pt", _checkpoint, _resume)
target("log of a training", "log.jsonl", _log, lambda folder: draw_loss_curve(Log(folder / "log.jsonl").read()))
target("cache of features", "store/shard.safetensors store/settings.json", _store, _use_store)
target("configuration of a training", "a.toml",
       lambda folder: (folder / "a.toml").write_text(toml_of(resolve({}, changes={"output.folder": "run"})), encoding="utf-8"),
       lambda folder: check(resolve(read_toml(folder / "a.toml"))))
target("extra_model_paths.yaml", "extra_model_paths.yaml", _comfyui,
       lambda folder: open_comfyui(folder).find("a.safetensors", ["emma"]))
target("prompts of own latents", "a.txt", lambda folder: (folder / "a.txt").write_text("a cat\na dog\n"),
       lambda folder: read_prompts(folder / "a.txt"))


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
target("references of an evaluation", "data/a/1.png data/a/a.mask.png", _data_folder,
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
