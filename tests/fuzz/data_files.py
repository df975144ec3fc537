"""Pictures and masks, and all that a training reads and leaves, but for its weights."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import torch
from PIL import Image
from target import target
from training_world import tiny_config, tiny_trainer, write_shard

from emma_core.evaluation.references import reference_of
from emma_core.files.comfyui_folders import open_comfyui
from emma_core.settings import read_toml, toml_of
from emma_core.training.checks import check
from emma_core.training.config import DataConfig, resolve
from emma_core.training.examples import contents_of, describe, read_examples, require
from emma_core.training.log import Log
from emma_core.training.own_latents import read_prompts
from emma_core.training.reports import draw_loss_curve
from emma_core.training.shards import Processes
from emma_core.training.store import FeatureStore

_PICTURES = {"png": "RGBA", "jpg": "RGB", "webp": "RGBA", "gif": "P", "tiff": "RGB", "bmp": "RGB", "tga": "RGB", "ppm": "RGB",
             "jp2": "RGB", "avif": "RGB"}


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

def data_folder(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        _picture(size=(96, 96)).save(folder / "data" / name / "1.png")
        (folder / "data" / name / "1.txt").write_text("a red cat\na cat\n")
    _masked(folder / "data" / "a")


def _jsonl(folder: Path) -> None:
    data_folder(folder)
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
target("data folder", "data/a/1.png data/a/1.txt data/b/1.txt data/a/a.mask.png", data_folder,
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
