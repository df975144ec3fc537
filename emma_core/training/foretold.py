"""Everything that would stop a run, found before anything is loaded, and all of it at once.

Files are judged by their headers: whether each is there, whole, of the right kind, and made for the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from ..base.headers import check_autoencoder, check_checkpoint
from ..base.ip_adapter_file import read_ip_adapter_layout
from ..base.lora_file import check_lora
from ..encoders.clip_vision import clip_tower_of
from ..encoders.weights import weights_path
from ..errors import EmmaError
from ..files.connector_file import read_connector_config
from ..model.ip_adapter_blocks import layers_in
from ..playground import PLAYGROUND, PLAYGROUND_DIR
from ..settings import sections
from ..text.t5_file import open_t5_file
from ..text.t5_layout import check_text_width
from ..text.t5_tokenizer import load_tokenizer
from .buckets import buckets
from .checks import checks_of
from .config import DataConfig, OutputConfig, TrainConfig
from .examples import Example, PictureSet, Problem, read_examples
from .identity import check_folder
from .lora_teacher import lora_files
from .sizes import cache_bytes, check_room, checkpoint_bytes, learning_numbers

Found = TypeVar("Found")
_NO_FOLDER = "."  # a dry run needs none


def problems_of(config: TrainConfig) -> tuple[list[Example], list[Problem]]:
    """The pictures that can be used, and every problem: of the settings, the files, the data, the folder and the disk."""
    faults = _Faults()
    named = config if config.output.folder else dataclasses.replace(
        config, output=OutputConfig(_NO_FOLDER, config.output.name))
    for check in checks_of(named):
        faults.of("settings", check)
    _check_files(config, faults)
    examples, problems = faults.of("data", lambda: read_examples(_with_usable_buckets(config.data))) or ([], [])
    problems = [*faults.found, *problems, *_without_masks(config, examples), *_folder_problems(config)]
    return examples, [*problems, *_disk_problems(dataclasses.replace(config, data=_with_usable_buckets(config.data)), examples)]


def _with_usable_buckets(data: DataConfig) -> DataConfig:
    """The pictures are looked at even where the sizes they are to become are impossible."""
    try:
        buckets(data)
    except EmmaError:
        usual = DataConfig()
        return dataclasses.replace(data, resolution_px=usual.resolution_px, bucket_step_px=usual.bucket_step_px,
                                   longest_shape=usual.longest_shape)
    return data


class _Faults:
    """What checks raise, each message once."""

    def __init__(self):
        self.found: list[Problem] = []

    def of(self, where: str, check: Callable[[], Found]) -> Found | None:
        """What a check gives; None if it found a fault."""
        try:
            return check()
        except EmmaError as fault:
            problem = Problem(where, str(fault), True)
            if all(problem.text != other.text for other in self.found):
                self.found.append(problem)
        return None


def _check_files(config: TrainConfig, faults: _Faults) -> None:
    """Each file that is there, alone and beside those that it works with."""
    missing = list(_missing(config))
    told = " ".join(problem.text for problem in faults.found)
    faults.found += [Problem("files", f"{setting} = {path!r} does not exist. Check the path; nothing is downloaded.", True)
                     for setting, path in missing if f"{setting} = {path!r} does not exist" not in told]
    absent = {setting for setting, _ in missing}

    def of(setting: str, check: Callable[[], Found]) -> Found | None:
        section, _, key = setting.partition(".")
        named = getattr(getattr(config, section), key)
        return None if setting in absent or not named else faults.of(setting, check)

    base, ella, teacher = config.base, config.ella, config.teacher
    width = of("base.checkpoint", lambda: check_checkpoint(base))
    of("base.vae", lambda: check_autoencoder(Path(base.vae)))
    of("base.lora", lambda: check_lora(Path(base.lora)))
    of("teacher.lora", lambda: [check_lora(path) for path in lora_files(Path(teacher.lora)).values()])
    connector = of("ella.file", lambda: read_connector_config(ella.file))
    if connector is None and base.checkpoint == PLAYGROUND and not ella.file:
        connector = read_connector_config(PLAYGROUND_DIR / "ella.safetensors")
    if connector and width and connector.width != width:
        faults.found.append(Problem("ella.file", f"the ELLA has tokens of width {connector.width}, the base reads width "
                                                 f"{width}. Choose an ELLA made for this kind of checkpoint.", True))
    of("ella.text_encoder", lambda: _check_text_encoder(config, connector.text_dim if connector else None,
                                                        "ella.tokenizer" not in absent))
    layout = of("teacher.ip_adapter", lambda: read_ip_adapter_layout(Path(teacher.ip_adapter)))
    if layout and width:
        of("teacher.ip_adapter", lambda: layout.check_base(width, Path(base.checkpoint).name))
        of("teacher.blocks", lambda: layers_in(teacher.blocks, layout.layers))
    if layout and teacher.ip_image_encoder and "teacher.ip_image_encoder" not in absent:
        tower = of("teacher.ip_image_encoder", lambda: clip_tower_of(weights_path(teacher.ip_image_encoder)))
        if tower:
            of("teacher.ip_image_encoder", lambda: layout.check_encoder(tower.projected, tower.hidden))


def _check_text_encoder(config: TrainConfig, width: int | None, with_tokenizer: bool) -> None:
    file = open_t5_file(config.ella.text_encoder)
    if width:
        check_text_width(file.config.d_model, width, Path(config.ella.text_encoder).name)
    if with_tokenizer:
        load_tokenizer(file, given=config.ella.tokenizer or None)


def _missing(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Settings that name a file or folder that is not there."""
    for name, kind in sections(TrainConfig).items():
        section = getattr(config, name)
        for entry in dataclasses.fields(kind):
            path = getattr(section, entry.name)
            is_file = "folders" in entry.metadata or (name, entry.name) == ("ella", "tokenizer")
            if is_file and path and path != PLAYGROUND and not Path(path).exists():
                yield f"{name}.{entry.name}", path


def _without_masks(config: TrainConfig, examples: list[Example]) -> list[Problem]:
    """References without a mask, where masks are wanted."""
    if not config.encoder.masked or config.what != "module":
        return []
    pictures = PictureSet.of(examples, config.data.own_reference)
    return [Problem(pictures.pictures[index].name, "has no mask, but encoder.masked is on; add one or switch it off", True)
            for index in pictures.used() if pictures.masks[index] is None]


def _folder_problems(config: TrainConfig) -> list[Problem]:
    if not config.output.folder:
        return [Problem("output.folder", "is not set; the run itself will need one", False)]
    faults = _Faults()
    faults.of("output.folder", lambda: check_folder(Path(config.output.folder), config))
    return faults.found


def _disk_problems(config: TrainConfig, examples: list[Example]) -> list[Problem]:
    """A disk that cannot hold the cache and the checkpoints."""
    faults = _Faults()
    if config.output.folder:
        needed = cache_bytes(config, examples) + checkpoint_bytes(config, learning_numbers(config))
        faults.of("disk", lambda: check_room(Path(config.output.folder), needed))
    return faults.found
