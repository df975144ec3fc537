"""Everything about a run's settings that can be refused before a picture is looked at or a model is loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ..base.config import check_files, spec_of
from ..base.own_text import check_has_own_text
from ..base.pairing import check_pairing
from ..base.spec import SD15
from ..encoders.kinds import suggestion
from ..encoders.loading import check_gives
from ..errors import TrainingConfigError
from ..files.module_file import read_module_config
from ..files.picture_file import open_picture
from ..files.plain_file import is_plain_name
from ..files.writing import check_new_folder
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from .buckets import buckets
from .config import TrainConfig
from .own_latents import check_own_latents, prompts_of
from .starts import wanted_features
from .teachers import named_kinds, teacher_kind


def check(config: TrainConfig) -> None:
    """Refuse settings that are missing, do not go together, or name files that are not there.

    Raises:
        SettingsError: which key, and what to set.
        FileError: a file that another kind of file was wanted in place of.
    """
    for one in checks_of(config):
        one()


def checks_of(config: TrainConfig) -> list[Callable[[], None]]:
    """Each of the checks, which raises what it finds."""
    checks: list[Callable[[], None]] = [
        partial(_check_folder, config), partial(_check_name, config.output.name), partial(_check_buckets, config),
        partial(_check_drops, config)]
    if config.teacher.own_latents:
        checks += [partial(check_own_latents, config), partial(prompts_of, config.teacher)]
    if config.teacher.own_text:
        checks.append(partial(_check_own_text_teacher, config))
    elif config.teacher.reading:
        checks.append(partial(_refuse_reading, config))
    checks += [
        partial(teacher_kind, config.teacher),
        partial(check_files, config.base, config.ella, _further_files(config), new_ella=config.what == "ella"),
        partial(_check_pairing, config), partial(_check_sample_references, config.report.sample_references)]
    if config.what == "module":
        checks += [partial(_check_encoder, config), partial(_check_start, config)]
    return [*checks, partial(_check_tensorboard, config)]


def _check_folder(config: TrainConfig) -> None:
    if not config.output.folder:
        raise TrainingConfigError("output.folder is not set. Name a folder for checkpoints, samples and the result.")
    check_new_folder(config.output.folder, "output.folder")


def _check_tensorboard(config: TrainConfig) -> None:
    if config.report.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise TrainingConfigError("report.tensorboard is on, but TensorBoard is not installed. Run `pip install tensorboard`, "
                                  "or switch it off: log.jsonl and loss.png hold the same.")


def encoder_file(config: TrainConfig) -> Path:
    """The reference encoder that the settings name, or the playground's own.

    Raises:
        TrainingConfigError: none is named.
    """
    own = PLAYGROUND_DIR / "encoder.safetensors" if config.base.checkpoint == PLAYGROUND else ""
    path = config.encoder.file or own
    if not path:
        raise TrainingConfigError("encoder.file is not set; wanted the reference encoder of a "
                                  f"{config.module.condition} module: {suggestion(wanted_features(config))}. Name the file or "
                                  "folder.")
    return Path(path)


def _further_files(config: TrainConfig) -> list[tuple[str, str]]:
    files = [("module.start", config.module.start), ("encoder.file", config.encoder.file)] if config.what == "module" else []
    return files + [("report.sample_references", path) for path in config.report.sample_references]


def _check_pairing(config: TrainConfig) -> None:
    if config.what == "module":
        start = config.module.start
        check_pairing(config.base, config.ella, [start] if start and Path(start).exists() else [])
    elif spec_of(config.base).pooled_width:
        raise TrainingConfigError(f"base.checkpoint is of the family {spec_of(config.base).family}, which reads a pooled text "
                                  "vector that no ELLA gives. Train modules on its own tokens, or choose another base.")


def _check_name(name: str) -> None:
    if not is_plain_name(name) or name.lower().endswith(".safetensors"):
        raise TrainingConfigError(f"output.name = {name!r:.100}; wanted the name of a file alone, without folder and ending. "
                                  "output.folder says where it is written, and .safetensors is added.")


def _check_sample_references(paths: Sequence[str]) -> None:
    for path in paths:
        try:
            open_picture(Path(path))
        except Exception as found:  # each of Pillow's formats raises kinds of its own for damage
            raise TrainingConfigError(f"report.sample_references = {path!r} cannot be read ({found}); wanted a picture. Check "
                                      "the file.") from found


def _check_buckets(config: TrainConfig) -> None:
    step_px, cell_px = config.data.bucket_step_px, SD15.pixels_per_latent  # all bases have the same
    buckets(config.data)
    if step_px % cell_px:
        raise TrainingConfigError(f"data.bucket_step_px = {step_px}; wanted a multiple of {cell_px}, the pixels of one latent. "
                                  f"Choose {max(1, step_px // cell_px) * cell_px}.")


def _check_drops(config: TrainConfig) -> None:
    objective = config.objective
    drops = {key: getattr(objective, key) for key in ("drop_text", "drop_reference", "drop_both")}
    if sum(drops.values()) > 1:
        raise TrainingConfigError(f"{', '.join(f'objective.{key} = {share:g}' for key, share in drops.items())} are shares of "
                                  f"the rows and add up to {sum(drops.values()):g}; wanted 1 at most. Lower one.")


def _check_own_text_teacher(config: TrainConfig) -> None:
    """The base itself teaches an ELLA alone, and alone."""
    if config.what != "ella":
        raise TrainingConfigError("teacher.own_text teaches an ELLA what the checkpoint's own text encoder says of a caption, "
                                  "and a module learns what no text says. Set it to false, or train an ELLA.")
    others = [f"teacher.{kind.key}" for kind in named_kinds(config.teacher)]
    if config.teacher.own_latents:
        others.append("teacher.own_latents")
    if others:
        raise TrainingConfigError(f"teacher.own_text does not go with {' and '.join(others)}. Remove one of them.")
    if config.base.checkpoint == PLAYGROUND:
        raise TrainingConfigError("teacher.own_text needs a checkpoint with its own text encoder, and the playground has none "
                                  "but its ELLA's. Set it to false.")
    if Path(config.base.checkpoint).exists():  # else told by the checks of files
        check_has_own_text(Path(config.base.checkpoint), spec_of(config.base))


def _refuse_reading(config: TrainConfig) -> None:
    raise TrainingConfigError(f"teacher.reading is {config.teacher.reading}, and teacher.own_text is not set: what is to be "
                              "read are the tokens of the base's own text encoder. Set teacher.own_text to true, or leave "
                              "teacher.reading out.")


def _check_encoder(config: TrainConfig) -> None:
    check_gives(encoder_file(config), wanted_features(config), config.encoder.open_clip_model or None)


def _check_start(config: TrainConfig) -> None:
    if config.module.start:
        features = wanted_features(config)
        found = {name: spec.tokens_per_vector for name, spec in read_module_config(config.module.start).features.items()}
        if found != features:
            raise TrainingConfigError(f"module.start = {config.module.start!r} reads {_in_words(found)} (tokens per vector), "
                                      f"the module of this run {_in_words(features)}. Start from a module of the same "
                                      "features, or from none.")


def _in_words(features: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in features.items())
