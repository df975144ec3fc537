"""Modules, connectors, references; encoders of text and of pictures; bases, LoRAs and teachers."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from clip_towers import TINY, random_tower, to_open_clip
from safetensors.torch import save_file
from small_models import OBJECT, small_connector, small_features, small_module, small_text, token_module
from small_t5 import PROMPT, SIZES, random_t5_encoder, save_sharded, save_single
from target import target
from test_adaface import weights_of
from test_open_clip_models import tiny
from test_open_clip_models import write_config as write_open_clip
from test_training_backbones import diffusers_lora, inputs, kohya_lora, lora_layers, save_folder, single_file
from test_training_teachers import plain_adapter, plus_adapter

from emma_core import Assembly, Reference, load_connector, load_module, save_module
from emma_core.__main__ import main
from emma_core.base.backbones import load_backbone
from emma_core.base.config import BaseConfig
from emma_core.encoders.families import CLIP_TOWERS
from emma_core.encoders.loading import load_encoder
from emma_core.errors import EmmaError
from emma_core.files.connector_file import save_connector
from emma_core.files.module_file import read_module_config
from emma_core.files.reference_file import load_reference, save_reference
from emma_core.model.reference_features import ReferenceFeatures
from emma_core.playground import PLAYGROUND_DIR
from emma_core.text.encoder import load_text_encoder
from emma_core.training.config import TeacherConfig
from emma_core.training.teachers import load_teacher

CLIP_TOWERS["clip-tiny"] = TINY  # the smallest that the code would ever meet is 600 MB


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
