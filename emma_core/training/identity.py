"""Which run a checkpoint belongs to: a folder is never gone on in with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..files.content_mark import content_mark
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from .checkpoints import checkpoints, load_checkpoint
from .config import TrainConfig


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a checkpoint belongs to; what may change between sittings is left out."""
    free = ("report.", "output.", "train.steps", "train.patience", "data.workers", "data.cache")
    usual = _flat(TrainConfig())
    return {"what": config.what, **{key: value for key, value in _flat(config).items() if not key.startswith(free)
                                    and not (key in _NEWER and value == usual[key])}}


def _flat(config: TrainConfig) -> dict[str, Any]:
    return {f"{section}.{key}": list(value) if isinstance(value, tuple) else value
            for section, table in config.to_dict().items() if isinstance(table, dict) for key, value in table.items()}


FILES = "files"  # their marks, in what a checkpoint says of its run
# runs that are older than these settings must find their folder again
_NEWER = ("module.layers", "module.inner", "teacher.blocks", "teacher.own_text", "ella.tokenizer", "train.held_out",
          "train.optimizer", "teacher.reading")
_PLACES = ("data.folder", "data.jsonl", "data.shards")


def file_marks(config: TrainConfig) -> dict[str, str]:
    """Of each file that the settings name, and that what is learnt depends on: a digest of its contents, see `content_mark`."""
    own = config.base.checkpoint == PLAYGROUND
    shipped = {"base.checkpoint": "unet", "base.vae": "autoencoder", "ella.file": "ella", "ella.text_encoder": "t5",
               "encoder.file": "encoder"}
    named = {"base.checkpoint": "" if own else config.base.checkpoint, "base.vae": config.base.vae,
             "base.lora": config.base.lora, "ella.file": config.ella.file, "ella.text_encoder": config.ella.text_encoder,
             "ella.tokenizer": config.ella.tokenizer, "encoder.file": config.encoder.file,
             "module.start": config.module.start, "teacher.lora": config.teacher.lora,
             "teacher.ip_adapter": config.teacher.ip_adapter, "teacher.ip_image_encoder": config.teacher.ip_image_encoder,
             "teacher.prompts": config.teacher.prompts}
    if own:
        named |= {key: PLAYGROUND_DIR / f"{name}.safetensors" for key, name in shipped.items() if not named[key]}
    return {key: content_mark(path) for key, path in named.items() if path}


def check_folder(folder: Path, config: TrainConfig) -> TrainConfig:
    """Refuse a folder that another run is in, before anything is written there.

    Returns:
        The configuration to go on with: a run that began before pictures were held out learns from all of them to its end.
    Raises:
        TrainingError: its newest checkpoint belongs to a run with other settings or of other files, or is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return config
    begun = load_checkpoint(found[-1])["run"]
    if "train.held_out" not in begun:
        config = replace(config, train=replace(config.train, held_out=0.0))
    check_identity(begun, config, found[-1])
    check_files_of_run(begun, file_marks(config), found[-1])
    return config


def check_files_of_run(found: Mapping[str, Any], marks: Mapping[str, str], checkpoint: Path) -> None:
    """Refuse a checkpoint of a run whose files had other contents under the same names.

    Args:
        found: what the checkpoint says of its run; of before contents belonged to it, it says nothing of them.
        marks: see `file_marks`.
        checkpoint: its path, for the message.
    Raises:
        TrainingError: the settings whose files are others.
    """
    before = found.get(FILES, {})
    changed = [key for key, mark in marks.items() if before.get(key, mark) != mark]
    if changed:
        raise TrainingError(f"{checkpoint} belongs to a run with other files: the contents of {', '.join(changed)} have "
                            "changed. Give this run a folder of its own, or put these files back.")


def check_identity(found: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint of a run with other settings; where the data are may differ, see `check_same_place`.

    Args:
        found: what `run_identity` gave of that run.
        config: of this one.
        checkpoint: its path, for the message.
    Raises:
        TrainingError: the settings that differ.
    """
    usual = _flat(TrainConfig())
    unsaid = {key: usual[key] for key in _NEWER}  # what a run has that does not say so
    here = {**unsaid, **run_identity(config)}
    known = {**unsaid, **run_identity(TrainConfig()), **found}  # newer settings than the checkpoint had their default
    differing = [f"{key} is {known.get(key)!r} there and {here.get(key)!r} here" for key in sorted(here)
                 if known.get(key) != here.get(key) and key not in _PLACES]
    _refuse_if(differing, checkpoint)


def check_same_place(found: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> None:
    """Refuse other data in another place: the same data may have moved, and data may change where they are.

    Args:
        found, config, checkpoint: as of `check_identity`.
    Raises:
        TrainingError: where the data were and are.
    """
    here = run_identity(config)
    _refuse_if([f"{key} is {found[key]!r} there and {here[key]!r} here, and the data differ" for key in _PLACES
                if key in found and bool(found[key]) + bool(here[key])
                and Path(found[key]).resolve() != Path(here[key]).resolve()], checkpoint)


def _refuse_if(differing: list[str], checkpoint: Path) -> None:
    if differing:
        raise TrainingError(f"{checkpoint} belongs to a run with other settings: {'; '.join(differing)}. Give this run a "
                            "folder of its own, or restore these settings.")
