"""Which run a checkpoint belongs to: a folder is never gone on in with other settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from .checkpoints import checkpoints, load_checkpoint
from .config import TrainConfig


def run_identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that a checkpoint belongs to; what may change between sittings is left out."""
    free = ("report.", "output.", "train.steps", "data.workers", "data.cache")
    usual = _flat(TrainConfig())
    return {"what": config.what, **{key: value for key, value in _flat(config).items() if not key.startswith(free)
                                    and not (key in _NEWER and value == usual[key])}}


def _flat(config: TrainConfig) -> dict[str, Any]:
    return {f"{section}.{key}": list(value) if isinstance(value, tuple) else value
            for section, table in config.to_dict().items() if isinstance(table, dict) for key, value in table.items()}


# runs that are older than these settings must find their folder again
_NEWER = ("module.layers", "module.inner", "teacher.blocks", "ella.tokenizer")
_PLACES = ("data.folder", "data.jsonl", "data.shards")


def check_folder(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that another run is in, before anything is written there.

    Raises:
        TrainingError: its newest checkpoint belongs to a run with other settings, or is damaged.
    """
    found = checkpoints(folder)
    if found:
        check_identity(load_checkpoint(found[-1])["run"], config, found[-1])


def check_identity(found: Mapping[str, Any], config: TrainConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint of a run with other settings; where the data are may differ, see `check_same_place`.

    Args:
        found: what `run_identity` gave of that run.
        config: of this one.
        checkpoint: its path, for the message.
    Raises:
        TrainingError: the settings that differ.
    """
    usual, here = run_identity(TrainConfig()), run_identity(config)
    known = {**usual, **found}  # settings that are newer than the checkpoint had their default
    differing = [f"{key} is {known.get(key)!r} there and {here.get(key)!r} here" for key in sorted({*_NEWER, *here})
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
